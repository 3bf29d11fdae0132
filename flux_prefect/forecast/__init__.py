"""A batch in virtual time: how long it takes, what it costs and how often it asks S3."""

__all__: list[str] = []
