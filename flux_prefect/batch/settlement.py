"""The end of calls whose answers were lost: by the bucket's records, then by the service's log."""

from __future__ import annotations

from contextlib import suppress

from flux_prefect.batch.context import BatchContext
from flux_prefect.bucket.published_image import read_generation
from flux_prefect.errors import Billed, BucketError
from flux_prefect.host.spool import PaidCall
from flux_prefect.manifest.records import ItemRecord, settle_calls
from flux_prefect.money.ledger import CallRecord
from flux_prefect.money.reconciliation import Reconciliation, reconcile

__all__ = ["Settlement"]


class Settlement:
    """Settles the calls of unknown cost that a batch's rows have, once all rows have ended.

    Args:
        context: the batch's bucket, spool, client and budget, whose ledger gets what is found.

    Attributes:
        changed: the records of the rows whose calls were settled, as they are now.
    """

    def __init__(self, context: BatchContext) -> None:
        self.changed: list[ItemRecord] = []
        self._context = context
        self._ledger = context.budget.ledger
        self._owing: list[ItemRecord] = []

    def add(self, record: ItemRecord) -> None:
        """Remember the record of a row if it has calls of unknown cost."""
        if record.possibly_billed:
            self._owing.append(record)

    async def settle(self) -> Reconciliation | None:
        """Settle the calls. Returns what the service's log says, None where it was not asked.

        Costs nothing where no row has such a call. Never raises for a bucket or a log that can't be read: the calls
        stay as they are.
        """
        names = {name for record in self._owing for name in record.possibly_billed} | set(self._ledger.sums.unknown)
        if not names:
            return None
        for record in self._owing:
            await self._settle_by_record(record)
        unsettled = [call for call in self._context.spool.open_calls() if call.client_request_id in names]
        found = await reconcile(self._context.client, self._context.spool, calls=unsettled) if unsettled else None
        if found is not None:
            self._settle_by_log(found, unsettled)
        self.changed = [self._settled(record, found or Reconciliation()) for record in self._owing]
        return found

    async def _settle_by_record(self, record: ItemRecord) -> None:
        """Settle the call whose images are published, by another host that did not note its answer."""
        unknown = self._ledger.row(record.row).unknown
        if not unknown or record.request is None or not record.images:
            return
        with suppress(BucketError, KeyError, ValueError):
            sidecar = await self._context.bucket.read_record(record.images[0])
            generation = read_generation(sidecar or {}, record.images, record.request)
            call = unknown.get(generation.client_request_id)
            if call is not None:
                self._deliver(call, generation.credits_used)

    def _settle_by_log(self, found: Reconciliation, calls: list[PaidCall]) -> None:
        for name, cost in found.billed.items():
            self._ledger.settle(name, Billed.YES, cost, delivered=False)
        for name in found.not_billed:
            self._ledger.settle(name, Billed.NO, None, delivered=False)
        for call in calls:
            if call.client_request_id in found.kept:
                kept = self._context.spool.find_generation(call.fingerprint)
                cost = None if kept is None else kept.credits_used
                self._ledger.settle(call.client_request_id, Billed.YES, cost, delivered=True)

    def _deliver(self, call: CallRecord, cost: float | None) -> None:
        self._ledger.settle(call.call, Billed.YES, cost, delivered=True)
        for noted in self._context.spool.open_calls(call.fingerprint):
            if noted.client_request_id == call.call:
                self._context.spool.close_call(noted)

    def _settled(self, record: ItemRecord, found: Reconciliation) -> ItemRecord:
        return record.model_copy(update=settle_calls(record, self._ledger, self._ledger.row(record.row), found))
