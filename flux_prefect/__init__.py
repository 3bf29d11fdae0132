"""Image generation as ordinary Prefect pipeline work."""
