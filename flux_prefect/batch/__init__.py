"""Many requests as one run: the table they come from, the work, and the report."""

__all__: list[str] = []
