"""Flows of the package: importable, and deployable by module path from the installed wheel."""

__all__: list[str] = []
