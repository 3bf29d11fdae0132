"""Manifests and reports: one record for each row of a batch, written while it runs, and their sums."""

__all__: list[str] = []
