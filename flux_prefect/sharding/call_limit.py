"""The limit of paid calls at once that all shards of a batch share."""

from __future__ import annotations

from prefect.client.orchestration import PrefectClient

from flux_prefect.credentials import AimlApiCredentials

__all__ = ["CallLimit"]


class CallLimit:
    """The limit of an account: its concurrency limit in Prefect if it names one, else an equal part for each shard.

    Args:
        client: a client of Prefect's server.
        account: the account that pays.
    """

    def __init__(self, client: PrefectClient, account: AimlApiCredentials) -> None:
        self._client = client
        self._name = account.concurrency_limit
        self._most = account.max_in_flight
        self._size: int | None = None

    async def resize(self, accepted: int | None = None) -> None:
        """Create the concurrency limit or set its size. Does nothing if the account names none.

        Args:
            accepted: the calls at once that the service accepts; None if that is unknown.
        """
        size = self._most if accepted is None else max(1, min(self._most, accepted))
        if self._name is not None and size != self._size:
            await self._client.upsert_global_concurrency_limit_by_name(self._name, size)
            self._size = size

    def of_each(self, shards: int) -> int:
        """Return how many calls each of several shards may have in flight."""
        return self._most if self._name is not None else max(1, self._most // shards)
