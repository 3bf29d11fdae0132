"""The calls that the sandbox received, billed and still owes an answer: one SQLite file in the data folder.

A call's row, the balance and the totals change in one transaction, committed before the answer leaves, so the
ledger stays correct about money even if the sandbox is killed with -9 at that moment.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from flux_prefect.sandbox.settings import START_BALANCE

__all__ = ["Call", "Entry", "Ledger", "LedgerReport", "LogPage", "StoredImages", "Summary", "Totals"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    number INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    inference_id TEXT NOT NULL,
    client_request_id TEXT,
    request TEXT,               -- JSON as understood, with the seed that decided the images
    status INTEGER,             -- NULL: no answer was given
    images INTEGER NOT NULL,    -- billed images
    credits INTEGER NOT NULL,
    fault TEXT,
    look TEXT,
    file_token TEXT UNIQUE,
    expires_at REAL
);
CREATE TABLE IF NOT EXISTS account (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    balance INTEGER NOT NULL,
    calls INTEGER NOT NULL DEFAULT 0,
    billed_calls INTEGER NOT NULL DEFAULT 0,
    billed_images INTEGER NOT NULL DEFAULT 0,
    credits INTEGER NOT NULL DEFAULT 0,
    refused INTEGER NOT NULL DEFAULT 0,
    downloads INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS reference_images (sha256 TEXT PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS settings (id INTEGER PRIMARY KEY CHECK (id = 1), changes TEXT NOT NULL);
"""


class Totals(BaseModel):
    """Sums over all calls since the last reset."""

    calls: int = Field(description="POSTs of generations that arrived, whatever the answer.")
    billed_calls: int = Field(description="Those that were charged for.")
    billed_images: int = Field(description="Images that were charged for.")
    credits: int = Field(description="What was charged.")
    refused: int = Field(description="Calls answered with an error status and not charged.")
    downloads: int = Field(description="Requests for result URLs, whatever the answer.")
    balance: int = Field(description="Credits left.")


class Summary(Totals):
    """The totals, and how many generations are being worked on."""

    in_flight: int = Field(description="Generations at work now.")
    peak_in_flight: int = Field(description="The most at once since the last reset.")


class Call(BaseModel):
    """One POST of a generation."""

    number: int = Field(description="Place in the ledger, from 1.")
    time: datetime = Field(description="When the call was entered, UTC.")
    client_request_id: str | None = Field(description="X-Client-Request-Id where it was valid.")
    inference_id: str = Field(description="The sandbox's id of the call.")
    prompt: str | None = Field(description="None where the request was refused unread.")
    seed: int | None = Field(description="The seed that decided the images, asked for or drawn.")
    model: str | None = Field(default=None, description="The model. None where the request was refused unread.")
    references: list[str] = Field(default=[], description="SHA-256 of its reference images, in order.")
    status: int | None = Field(description="The answer's status. None: no answer was given.")
    billed: bool = Field(description="Whether the call was charged for.")
    images: int = Field(description="Images charged for.")
    credits: int = Field(description="What was charged.")
    fault: str | None = Field(description="The fault that struck the call.")


class LedgerReport(BaseModel):
    """What `/sandbox/ledger` shows."""

    totals: Summary = Field(description="Sums over all calls.")
    rows: list[Call] = Field(default=[], description="Every call, in order; none in a summary.")


@dataclass(frozen=True)
class StoredImages:
    """What is needed to draw the images of one call again, byte for byte."""

    request: str
    look: str
    expires_at: float


@dataclass(frozen=True)
class Entry:
    """One call, about to be written down."""

    inference_id: str
    client_request_id: str | None
    request: str | None
    status: int | None
    fault: str | None = None
    images: int = 0
    credits: int = 0
    look: str | None = None
    file_token: str | None = None
    expires_at: float | None = None


@dataclass(frozen=True)
class LogPage:
    """Which calls of the log are asked for; None takes all."""

    start: float
    end: float
    model: str | None
    succeeded: bool | None
    limit: int
    offset: int


# A charged call has succeeded for the service, even if its caller got no answer.
_LOG = """
SELECT *, count(*) OVER () AS total FROM (
  SELECT *, json_extract(request, '$.model') AS model,
    (credits > 0 OR coalesce(status, 0) BETWEEN 200 AND 299) AS succeeded
  FROM calls WHERE request IS NOT NULL AND at >= :start AND at < :end
)
WHERE (:model IS NULL OR model = :model) AND (:succeeded IS NULL OR succeeded = :succeeded)
ORDER BY number DESC LIMIT :limit OFFSET :offset
"""


class Ledger:
    """The sandbox's ledger. For one thread; every write is committed on return and survives kill -9."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        # With WAL, NORMAL keeps every commit through a killed process; only a power cut can lose the last ones.
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        self._open_account()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def record(self, entry: Entry) -> bool:
        """Record the call and charge its cost.

        Returns False, with nothing written, if the balance does not cover it.
        """
        billed, failed = entry.images > 0, (entry.status or 0) >= 400  # noqa: PLR2004 - where errors begin
        with self._transaction():
            charged = self._db.execute(
                "UPDATE account SET balance = balance - :credits, credits = credits + :credits, calls = calls + 1,"
                " billed_calls = billed_calls + :billed, billed_images = billed_images + :images,"
                " refused = refused + :refused WHERE balance >= :credits",
                {
                    "credits": entry.credits,
                    "images": entry.images,
                    "billed": billed,
                    "refused": failed and not billed,
                },
            )
            if charged.rowcount == 0:
                return False
            self._db.execute(
                "INSERT INTO calls (at, inference_id, client_request_id, request, status, images, credits,"
                " fault, look, file_token, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    time.time(),
                    entry.inference_id,
                    entry.client_request_id,
                    entry.request,
                    entry.status,
                    entry.images,
                    entry.credits,
                    entry.fault,
                    entry.look,
                    entry.file_token,
                    entry.expires_at,
                ),
            )
        return True

    def count_download(self) -> None:
        """Count one request for a result URL."""
        self._db.execute("UPDATE account SET downloads = downloads + 1")

    def images(self, file_token: str) -> StoredImages | None:
        """The images under a result URL, expired or not."""
        row = self._db.execute(
            "SELECT request, look, expires_at FROM calls WHERE file_token = ?", (file_token,)
        ).fetchone()
        return StoredImages(**dict(row)) if row else None

    def keep_reference(self, sha256: str, content: bytes) -> None:
        """Keep a reference image, to draw the images of its edits again."""
        self._db.execute("INSERT OR IGNORE INTO reference_images VALUES (?, ?)", (sha256, content))

    def reference(self, sha256: str) -> bytes:
        """The bytes of a reference image that was kept."""
        row = self._db.execute("SELECT content FROM reference_images WHERE sha256 = ?", (sha256,)).fetchone()
        return bytes(row[0])

    @property
    def balance(self) -> int:
        """Credits left."""
        return int(self._db.execute("SELECT balance FROM account").fetchone()[0])

    @balance.setter
    def balance(self, amount: int) -> None:
        self._db.execute("UPDATE account SET balance = ?", (amount,))

    def totals(self) -> Totals:
        """The sums; costs the same however many calls there were."""
        return Totals.model_validate(dict(self._db.execute("SELECT * FROM account").fetchone()))

    def calls(self) -> list[Call]:
        """Every call, in order."""
        return [Call.model_validate(_call(row)) for row in self._db.execute("SELECT * FROM calls ORDER BY number")]

    def log(self, page: LogPage) -> tuple[list[dict[str, Any]], int]:
        """A page of the calls that the service's own log would show, the newest first, and the number of all."""
        rows = [dict(row) for row in self._db.execute(_LOG, asdict(page))]
        if rows:
            return rows, rows[0]["total"]
        whole = self._db.execute(_LOG, {**asdict(page), "limit": 1, "offset": 0}).fetchone()
        return [], whole["total"] if whole else 0

    def saved_settings(self) -> str | None:
        """The JSON that `save_settings` kept."""
        row = self._db.execute("SELECT changes FROM settings").fetchone()
        return str(row[0]) if row else None

    def save_settings(self, changes: str) -> None:
        """Keep the settings over a restart."""
        self._db.execute("INSERT OR REPLACE INTO settings (id, changes) VALUES (1, ?)", (changes,))

    def clear(self) -> None:
        """Delete everything: calls, images, settings; the balance is a new account's."""
        with self._transaction():
            for table in ("calls", "account", "settings", "reference_images"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - the names stand in the line above
            self._open_account()

    def _open_account(self) -> None:
        self._db.execute("INSERT OR IGNORE INTO account (id, balance) VALUES (1, ?)", (START_BALANCE,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _call(row: sqlite3.Row) -> dict[str, Any]:
    request = json.loads(row["request"] or "{}")
    return {
        **dict(row),
        "time": datetime.fromtimestamp(row["at"], timezone.utc),
        "prompt": request.get("prompt"),
        "seed": request.get("seed"),
        "model": request.get("model"),
        "references": [reference["sha256"] for reference in request.get("references", [])],
        "billed": row["images"] > 0,
    }
