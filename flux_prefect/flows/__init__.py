"""The flows that ship: importable, and deployable by module path from the wheel alone."""
