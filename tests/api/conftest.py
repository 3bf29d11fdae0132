from __future__ import annotations

import io
from datetime import datetime, timezone

import pytest
from PIL import Image

from flux_prefect.api.models import ImageRequest

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)


@pytest.fixture
def now() -> datetime:
    """A frozen present."""
    return NOON


@pytest.fixture
def lighthouse() -> ImageRequest:
    """The request that most tests send."""
    return ImageRequest(prompt="a lighthouse", seed=7)


def _encode(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    """A whole JPEG of 96 x 64 pixels."""
    return _encode("JPEG")


@pytest.fixture(scope="session")
def png() -> bytes:
    """A whole PNG of 96 x 64 pixels."""
    return _encode("PNG")
