"""The local stand-in for the image service, and an S3 server beside it: `python -m flux_prefect.sandbox`."""

__all__: list[str] = []
