"""What stands behind the browser: a team's Prefect with its UI, and what its runs leave in the bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.team import Team, start_team

from deployments.serve import PREFECT_FILE
from flux_prefect.bucket.image_bucket import ImageBucket


@contextmanager
def open_stage(folder: Path) -> Iterator[Team]:
    """A server with both UIs, all deployments, the types of our blocks, and a worker: in about half a minute.

    What runs there has this process's environment.
    """
    # Else the UIs are unpacked into the installed package, where servers that start at once meet.
    with start_team(folder / "home", {"PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui")}) as team:
        team.prefect("block", "register", "-m", "flux_prefect")
        team.deploy(PREFECT_FILE)
        with team.worker(folder):
            yield team


def copy_to_disk(bucket: ImageBucket, folder: Path) -> Path:
    """Copy all of the bucket's prefix into a folder; the page of its one run."""
    client = bucket.get_client()
    listed = client.list_objects_v2(Bucket=bucket.bucket_name, Prefix=f"{bucket.prefix}/")["Contents"]
    for key in (entry["Key"] for entry in listed):
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket.bucket_name, key, str(path))
    (page,) = folder.glob(f"{bucket.prefix}/manifests/*/index.html")
    return page
