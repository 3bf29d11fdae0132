"""Forecast of a batch by simulation: duration, cost and S3 requests."""

__all__: list[str] = []
