"""Control a running sandbox from Python."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import httpx
from typing_extensions import Self

from flux_prefect.sandbox.ledger import LedgerReport, Summary
from flux_prefect.sandbox.settings import SandboxSettings

__all__ = ["SandboxControl", "SandboxRefused"]


class SandboxRefused(Exception):
    """The sandbox did not take a setting or a fault; the message says why."""


class SandboxControl:
    """Settings, faults and the ledger of the sandbox at `url`. Needs no key. Close it, or use it in a `with`.

    with SandboxControl("http://127.0.0.1:8765") as sandbox:
        sandbox.inject("rate_limited", times=3, retry_after=1)
        ...
        print(sandbox.summary().billed_images)

    Example:
        ```python
        with SandboxControl(url) as control:
            control.inject("rate_limited", times=2, retry_after=0.1)
            await generate_image(request, credentials)
            print(control.summary().billed_calls)
        ```
    """

    def __init__(self, url: str) -> None:
        # A connection a request: nothing is held open between two looks at the ledger.
        self._http = httpx.Client(
            base_url=url, timeout=30, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )

    def inject(
        self, fault: str, *, times: int | None = 1, prompt_contains: str | None = None, **arguments: Any
    ) -> None:
        """Arm a fault for the next `times` calls (None: for all), or those whose prompt holds a text.

        Raises:
            SandboxRefused: there is no such fault, or it doesn't take the arguments.
        """
        self._send(
            "POST",
            "/sandbox/faults",
            json={"fault": fault, "times": times, "prompt_contains": prompt_contains, **arguments},
        )

    def clear_faults(self) -> None:
        """Disarm every fault."""
        self._send("DELETE", "/sandbox/faults")

    def fault_names(self) -> dict[str, str]:
        """Every fault there is, with its description."""
        names: dict[str, str] = self._send("GET", "/sandbox/faults/names").json()
        return names

    def settings(self, **changes: Any) -> SandboxSettings:
        """Change the named settings, if any, and read them all.

        Raises:
            SandboxRefused: a name or a value is wrong.
        """
        answer = self._send("PATCH", "/sandbox/settings", json=changes) if changes else None
        return SandboxSettings.model_validate_json((answer or self._send("GET", "/sandbox/settings")).content)

    def ledger(self) -> LedgerReport:
        """Every call so far, and the totals."""
        return LedgerReport.model_validate_json(self._send("GET", "/sandbox/ledger").content)

    def summary(self) -> Summary:
        """The totals alone; cheap."""
        answer = self._send("GET", "/sandbox/ledger", params={"summary": "true"})
        return LedgerReport.model_validate_json(answer.content).totals

    def reset(self) -> None:
        """Reset the sandbox: empty ledger, no faults, the settings that it was started with."""
        self._send("POST", "/sandbox/reset")

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        answer = self._http.request(method, path, **content)
        if answer.is_client_error:
            raise SandboxRefused(answer.json()["message"])
        return answer.raise_for_status()
