"""What all contestants share: the table that they are given, and what they give back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from pydantic import BaseModel

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

BUCKET = "images"
MODEL = "flux/kontext-max/text-to-image"


class Row(BaseModel):
    """One line of a prompt table."""

    id: str
    prompt: str
    seed: int


@dataclass
class Contender:
    """A contestant at the start.

    Attributes:
        publish: has every image of a table in the bucket.
        s3_calls: the S3 requests that it sends, by operation, repeated ones counted again.
    """

    publish: Callable[[Path], Awaitable[None]]
    s3_calls: Counter[str] = field(default_factory=Counter)


def write_table(path: Path, batch: str, rows: int) -> None:
    """A table of `rows` images that no other batch asks for."""
    lines = (
        Row(id=f"{batch}-{number}", prompt=f"A lighthouse at dusk, {batch}, {number}.", seed=number)
        for number in range(1, rows + 1)
    )
    path.write_text("".join(f"{line.model_dump_json()}\n" for line in lines), encoding="utf-8")


def read_table(path: Path) -> list[Row]:
    """The rows of a table."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def open_s3(in_flight: int) -> S3Client:
    """A client for that many threads, of the server that the environment names."""
    return boto3.client("s3", config=Config(max_pool_connections=in_flight))


def count_calls(client: S3Client) -> Counter[str]:
    """A count, by operation, of the requests that the client sends from now on."""
    calls: Counter[str] = Counter()

    def count(event_name: str, **_: Any) -> None:
        calls[event_name.rpartition(".")[2]] += 1

    client.meta.events.register("before-send.s3", count)
    return calls
