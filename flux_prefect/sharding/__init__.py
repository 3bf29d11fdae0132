"""One batch over many workers: shards, their runs, their heartbeats and the supervisor."""
