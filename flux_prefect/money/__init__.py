"""What may be spent, what was spent, and what the service charged."""
