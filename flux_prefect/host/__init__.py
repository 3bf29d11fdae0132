"""This machine: the spool of paid answers and images, and the locks."""

__all__: list[str] = []
