"""The state of a running sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flux_prefect.sandbox.faults import ArmedFaults
from flux_prefect.sandbox.ledger import Ledger, Summary
from flux_prefect.sandbox.limits import InFlight, RateWindow
from flux_prefect.sandbox.settings import SandboxSettings, ServiceSettings

__all__ = ["State"]


class State:
    """Ledger, settings, faults and counters of one sandbox, shared by all its endpoints.

    Settings changed over HTTP last over a restart; those named in `start` (the command line's) win over them.
    The API key lives here only: nothing writes or prints it.
    """

    def __init__(self, ledger: Ledger, api_key: str, start: Mapping[str, Any] | None = None) -> None:
        self.ledger = ledger
        self.api_key = api_key
        self.faults = ArmedFaults()
        self.in_flight = InFlight()
        self.generation_rate = RateWindow()
        self.log_rate = RateWindow()
        self._start = dict(start or {})
        self._changes: dict[str, Any] = json.loads(ledger.saved_settings() or "{}")
        self.settings = ServiceSettings(**{**self._changes, **self._start})

    @property
    def all_settings(self) -> SandboxSettings:
        """The settings and the balance."""
        return SandboxSettings(**self.settings.model_dump(), balance=self.ledger.balance)

    def change(self, changes: Mapping[str, Any]) -> SandboxSettings:
        """Change settings, the balance among them, and keep them.

        Raises:
            ValidationError: a name or a value is wrong; nothing has changed.
        """
        wanted = SandboxSettings.model_validate({**self.all_settings.model_dump(), **changes})
        if "balance" in changes:
            self.ledger.balance = wanted.balance
        self.settings = ServiceSettings(**wanted.model_dump(exclude={"balance"}))
        self._changes |= {name: value for name, value in changes.items() if name != "balance"}
        self.ledger.save_settings(json.dumps(self._changes))
        return wanted

    def summary(self) -> Summary:
        """The totals, and what is in flight."""
        return Summary(
            **self.ledger.totals().model_dump(),
            in_flight=self.in_flight.now,
            peak_in_flight=self.in_flight.peak,
        )

    def reset(self) -> None:
        """Reset to a new sandbox: no calls, no images, no faults, the settings of the command line."""
        self.ledger.clear()
        self.faults.clear()
        self.in_flight.clear()
        self.generation_rate.clear()
        self.log_rate.clear()
        self._changes = {}
        self.settings = ServiceSettings(**self._start)
