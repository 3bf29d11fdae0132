"""The command flux-prefect."""

__all__: list[str] = []
