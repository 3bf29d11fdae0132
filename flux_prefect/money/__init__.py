"""Budget, allocation to shards, and reconciliation with the service's log."""

__all__: list[str] = []
