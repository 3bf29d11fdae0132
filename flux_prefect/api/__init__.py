"""The image service: its requests, answers, errors and client, with no Prefect in it."""

__all__: list[str] = []
