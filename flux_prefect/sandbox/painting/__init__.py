"""The sandbox's images: drawn from a digest, so that the same request always gives the same bytes."""

__all__: list[str] = []
