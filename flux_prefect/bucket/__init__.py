"""S3: the ImageBucket block, object keys, conditional objects and leases."""
