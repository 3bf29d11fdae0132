"""`flux-prefect recover`: answers that were paid for and could not be parsed at the time."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from flux_prefect import custody
from flux_prefect.api.models import Generation
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.bucket.published_image import PublishingRun
from flux_prefect.cli.exit_status import FAILED, MISUSED
from flux_prefect.cli.options import make_command, make_option
from flux_prefect.cli.terminal import refuse_bad_settings
from flux_prefect.concurrency import run_in_thread
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import FluxError, ServiceError
from flux_prefect.host.spool import KeptAnswer, Spool
from flux_prefect.money.budget import describe_credits

__all__ = ["recover"]


class _Recovery(BaseModel):
    """What became of one file."""

    file: Path = Field(description="The kept answer.")
    outcome: Literal["recovered", "superseded", "unreadable", "not an answer", "not published"] = Field(
        description=(
            "superseded: another answer to the same request is recorded. unreadable: this release can't parse it. "
            "not published: recovered, with an image that could not be published."
        )
    )
    message: str | None = Field(default=None, description="Why it is not recovered or not published.")
    prompt: str | None = None
    seed: int | None = None
    request_id: str | None = None
    fingerprint: str | None = None
    credits_used: float | None = None
    received_at: str | None = None
    images: list[str] = Field(default_factory=list, description="URLs, or `inline` for bytes in the spool.")
    published: list[str] = Field(default_factory=list, description="The images in the bucket.")


def _run(given: dict[str, Any]) -> int:
    refuse_bad_settings()
    spool = Spool()
    try:
        files = list(_find_files(given["files"])) if given["files"] else sorted((spool.root / "answers").glob("*.json"))
        recoveries = asyncio.run(_recover_all(files, spool, given["publish"], given["credentials"]))
    except (FluxError, ValueError) as error:
        print(error, file=sys.stderr)
        return MISUSED
    if given["json"]:
        answers = [each.model_dump(mode="json") for each in recoveries]
        print(json.dumps({"answers": answers}, indent=2, ensure_ascii=False))
    else:
        for each in recoveries:
            print("\n".join(_describe(each)))
        if not recoveries:
            print("No kept answer: every answer of this host was parsed.")
    return 0 if all(each.outcome in {"recovered", "superseded"} for each in recoveries) else FAILED


def _find_files(places: Iterable[Path]) -> Iterable[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(place.glob("*.json"))
        elif place.exists():
            yield place
        else:
            raise ValueError(f"There is no file {place}.")


async def _recover_all(
    files: Iterable[Path], spool: Spool, publish: str | None, credentials: str | None
) -> list[_Recovery]:
    spool.prepare()
    bucket = None if publish is None else await ImageBucket.resolve(publish)
    account = None if bucket is None else await AimlApiCredentials.resolve(credentials)
    recoveries = []
    for file in files:
        recovery, generation = await _recover(file, spool)
        if recovery.outcome == "recovered" and bucket is not None and account is not None and generation is not None:
            await _publish(recovery, generation, spool, bucket, account)
        recoveries.append(recovery)
    return recoveries


async def _recover(file: Path, spool: Spool) -> tuple[_Recovery, Generation | None]:
    try:
        kept = await run_in_thread(_read, file)
    except (OSError, ValidationError) as error:
        reason = str(error) if isinstance(error, OSError) else "It is not a file of a spool's answers/."
        return _Recovery(file=file, outcome="not an answer", message=reason), None
    known = {
        "file": file,
        "prompt": kept.request.prompt,
        "seed": kept.request.seed,
        "request_id": kept.call.client_request_id,
        "received_at": kept.answer.received_at.isoformat(),
    }
    try:
        generation, recorded = await custody.take_up(kept, spool)
    except ServiceError as error:
        reason = f"{error.message} The file stays where it is: try a newer release."
        return _Recovery(outcome="unreadable", message=reason, credits_used=error.credits_used, **known), None
    known |= {
        "seed": generation.seed,
        "fingerprint": generation.fingerprint,
        "credits_used": generation.credits_used,
        "images": [image.url or "inline" for image in generation.images],
    }
    if not recorded:
        reason = "A later answer to the same request is recorded and used. The file stays where it is."
        return _Recovery(outcome="superseded", message=reason, **known), None
    return _Recovery(outcome="recovered", **known), generation


def _read(file: Path) -> KeptAnswer:
    return KeptAnswer.model_validate_json(file.read_bytes())


async def _publish(
    recovery: _Recovery, generation: Generation, spool: Spool, bucket: ImageBucket, account: AimlApiCredentials
) -> None:
    """Download and publish every image. Nothing is paid for, whatever fails."""
    async with account.model_copy(update={"base_url": generation.endpoint}).open_client() as client:
        for image in generation.images:
            try:
                file = await custody.download(generation, image.index, client, spool, bucket)
                published = await custody.publish(file, bucket, PublishingRun())
                await custody.release(file, published, spool)
                recovery.published.append(published.uri)
            except FluxError as error:
                recovery.outcome, recovery.message = "not published", error.message


def _describe(recovery: _Recovery) -> Iterable[str]:
    yield f"{recovery.outcome}: {recovery.file}"
    if recovery.request_id is not None:
        cost = "cost unknown" if recovery.credits_used is None else describe_credits(recovery.credits_used)
        yield f"  {recovery.prompt} · seed {recovery.seed} · {cost} · {recovery.request_id}"
    yield from (f"  {each}" for each in [*recovery.images, *recovery.published])
    if recovery.message is not None:
        yield f"  {recovery.message}"


recover = make_command(
    _run,
    (
        make_option(
            "files", list[Path], [], is_first=True, help="Kept answers, or folders of them. Default: all of the spool."
        ),
        make_option(
            "publish",
            str | None,
            None,
            help="Download the images and publish them to this bucket: s3://name/prefix, or a saved block.",
        ),
        make_option(
            "credentials",
            str | None,
            None,
            help="A saved account for the downloads. Default: the environment's. Nothing is paid.",
        ),
        make_option("json", bool, False, help="Print what became of each file as one JSON object."),
    ),
)
