"""What a test does where a program is missing that it needs."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def do_without(missing: Exception) -> NoReturn:
    """Skip; fail in CI, where it must not go unnoticed."""
    if os.environ.get("CI"):
        pytest.fail(str(missing))
    pytest.skip(str(missing))
