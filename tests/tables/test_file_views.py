from __future__ import annotations

from pathlib import Path

from flux_prefect.tables.file_views import open_view


def test_a_view_excludes_bytes_appended_later(tmp_path: Path) -> None:
    """A view ends at its size, so that a consistent part of a growing file can be uploaded."""
    with (tmp_path / "growing").open("w+b", buffering=0) as file:
        file.write(b"one\ntwo\n")
        with open_view(file, 8) as view:
            file.write(b"three\n")
            assert view.read() == b"one\ntwo\n"
            assert view.seek(0, 2) == 8
            assert view.read() == b""
            assert view.seek(-4, 2) == 4
            assert list(view) == [b"two\n"]
        assert not file.closed
