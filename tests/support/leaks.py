"""The search for keys in what tests leave behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prefect.settings import get_current_settings

API_KEY = "sandbox-key-5f1d9c2e77"
S3_SECRET_KEY = "sandbox-s3-secret-9d8c7b6a5f"
OTHER_API_KEY = "another-key-77aa"
"""Of an account that shares the endpoint."""

KEYS = (API_KEY, S3_SECRET_KEY, OTHER_API_KEY)


def find_leaks(places: Iterable[Path]) -> list[str]:
    """The files, in these folders or themselves, that hold a key."""
    files = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    return [str(path) for path in files if _holds_key(path)]


def database_file() -> Path:
    """The Prefect server's database."""
    database = get_current_settings().server.database.connection_url
    assert database is not None
    return Path(database.get_secret_value().partition("///")[2])


def database_files() -> list[Path]:
    """The files of the Prefect server's database, the write-ahead log among them, which holds the newest."""
    file = database_file()
    files = list(file.parent.glob(f"{file.name}*"))
    assert f"{file.name}-wal" in {path.name for path in files}
    return files


def _holds_key(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:  # gone meanwhile, or a socket
        return False
    return any(key.encode() in content for key in KEYS)
