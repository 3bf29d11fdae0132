"""Where the contestants meet: the sandbox, its S3 server and a Prefect server, all for this command alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3

from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox

from .contestants.contender import BUCKET
from .prefect_server import NO_UI, PrefectServer, start_prefect

_ACCOUNTS = ("AIML", "AWS_", "FLUX_", "PREFECT_")


@dataclass(frozen=True)
class Stage:
    """Everything that a contestant needs.

    Attributes:
        folder: for files of the measured processes.
        environment: of the measured processes.
    """

    folder: Path
    sandbox: RunningSandbox
    prefect: PrefectServer
    environment: dict[str, str]

    def count_images(self, prefix: str) -> int:
        """How many images stand under a prefix."""
        names = self.sandbox.environment
        client = boto3.client(
            "s3",
            endpoint_url=names["AWS_ENDPOINT_URL_S3"],
            region_name="us-east-1",
            aws_access_key_id=names["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=names["AWS_SECRET_ACCESS_KEY"],
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return sum(entry["Key"].endswith(".jpg") for page in pages for entry in page.get("Contents", []))


@contextmanager
def open_stage(*, latency: float, image_bytes: int, server: Mapping[str, str] | None = None) -> Iterator[Stage]:
    """Start everything, which takes about fifteen seconds; at the end stop it and leave nothing behind.

    Args:
        latency: seconds that a generation takes.
        image_bytes: the size of every image.
        server: PREFECT_ variables of the Prefect server's own.
    """
    with tempfile.TemporaryDirectory(prefix="flux_prefect-benchmarks-") as name:
        folder = Path(name)
        _isolate(folder)
        with (
            start_sandbox(folder / "sandbox", latency=latency, fast_bytes=image_bytes) as sandbox,
            start_prefect(folder / "prefect", {**NO_UI, **(server or {})}) as prefect,
        ):
            environment = {**os.environ, **sandbox.environment, "PREFECT_API_URL": prefect.api_url}
            yield Stage(folder, sandbox, prefect, environment)


def _isolate(folder: Path) -> None:
    """Keep the developer's own Prefect, AWS and service account out of this process and all that it starts."""
    for name in [name for name in os.environ if name.startswith(_ACCOUNTS)]:
        del os.environ[name]
    os.environ |= {
        "HOME": str(folder),
        "NO_PROXY": "127.0.0.1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "AWS_CONFIG_FILE": str(folder / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-aws-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
