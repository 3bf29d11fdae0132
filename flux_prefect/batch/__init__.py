"""One batch: its plan, its engine and its final state."""

__all__: list[str] = []
