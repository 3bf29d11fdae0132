"""The flows that ship: importable, and deployable by module path from the wheel alone."""

__all__: list[str] = []
