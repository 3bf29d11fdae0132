"""What the exit statuses of the commands mean."""

from __future__ import annotations

__all__ = ["FAILED", "INTERRUPTED", "MISUSED"]

FAILED = 1
"""A run that is not Completed."""

MISUSED = 2
"""Arguments or settings that can't be used."""

INTERRUPTED = 130
"""A run that was stopped by Ctrl-C."""
