"""One batch over many workers: shards, their runs, their heartbeats and the supervisor."""

__all__: list[str] = []
