"""What may be spent, what was spent, and what the service charged."""

__all__: list[str] = []
