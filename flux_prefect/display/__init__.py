"""Presentation of batches: progress, artifacts, galleries, contact sheets, run names and events."""

__all__: list[str] = []
