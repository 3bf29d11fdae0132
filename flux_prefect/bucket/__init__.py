"""S3: the ImageBucket block, object keys, conditional objects and leases."""

__all__: list[str] = []
