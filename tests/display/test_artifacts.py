"""The artifacts of a batch in Prefect's UI."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.images import ODD, draw, publish
from support.reports import failed_record, make_report, published_record

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.display.artifacts import live_progress, publish_artifacts
from flux_prefect.display.progress import Progress
from flux_prefect.flows.publish_batch import publish_batch
from flux_prefect.host.spool import Spool
from flux_prefect.manifest.records import ItemRecord
from flux_prefect.manifest.report import BatchReport

LOGGER = logging.getLogger("test_artifacts")


async def _artifacts(run: str) -> dict[str | None, Any]:
    async with get_client() as client:
        only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(run)]))
        return {artifact.key: artifact for artifact in await client.read_artifacts(artifact_filter=only)}


@pytest.mark.usefixtures("prefect_server")
class TestInARun:
    """With a real Prefect server."""

    async def test_progress_is_live_and_complete_at_the_end(self) -> None:
        """One artifact, updated while the block runs."""
        progress = Progress(4)
        seen = []

        @flow
        async def batch() -> str:
            run = str(flow_run.id)
            async with live_progress(progress, LOGGER, every=0.05):
                progress.add(published_record(1))
                for _ in range(200):
                    await asyncio.sleep(0.05)
                    found = (await _artifacts(run)).get("flux-progress")
                    if found is not None and found.data == 25:
                        seen.append(found.description)
                        break
                for row in (2, 3, 4):
                    progress.add(published_record(row))
            return run

        (found,) = (await _artifacts(await batch())).values()
        assert [text.startswith("1 of 4 done, 0 credits ($0.00) so far, ") for text in seen] == [True]
        assert (found.key, found.type, found.data) == ("flux-progress", "progress", 100)
        assert found.description == "4 of 4 done, 0 credits ($0.00) so far"

    async def test_a_batch_that_ends_has_summary_gallery_and_page(self, bucket: ImageBucket, tmp_path: Path) -> None:
        """Summary and gallery are artifacts of the run, the page is in the bucket."""
        request = ImageRequest(prompt=ODD, seed=1)
        image = await publish(bucket, tmp_path, request, draw(90))
        records = [ItemRecord(row=1, id="fox", status="published", request=request, images=(image,)), failed_record(2)]
        report = _finish(records, bucket, tmp_path)
        found = await _artifacts(await _leave(report, records, bucket, tmp_path))

        assert set(found) == {"flux-summary", "flux-gallery"}
        assert {artifact.description for artifact in found.values()} == {report.summary()}
        assert str(found["flux-gallery"].data).count("data:image/jpeg;base64,") == 1
        page = bucket.get_client().get_object(
            Bucket=bucket.bucket_name, Key=f"{bucket.prefix}/manifests/run-1/index.html"
        )
        assert b"<article" in page["Body"].read()

    async def test_a_part_that_fails_is_logged_and_left_out(
        self, bucket: ImageBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Without a bucket there is no page; an image that can't be read has no thumbnail."""
        gone = ImageBucket(**{**bucket.model_dump(), "bucket_name": "no-such-bucket"})
        records = [published_record(1)]
        found = await _artifacts(await _leave(_finish(records, gone, tmp_path), records, gone, tmp_path))

        assert "The page of all images is missing from this run's artifacts: " in caplog.text
        assert "index.html" not in str(found["flux-summary"].data)
        assert "no thumbnail" in str(found["flux-gallery"].data)


@pytest.mark.usefixtures("prefect_server")
async def test_a_run_of_the_batch_flow_has_all_artifacts(bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """Under stable keys, at a run with a descriptive name."""
    table = [{"id": name, "prompt": f"{name} {uuid4().hex}"} for name in ("fox", "owl")]
    report = await publish_batch(table, bucket, credentials)

    run = report.items[0].run
    assert run is not None
    found = await _artifacts(run)
    assert set(found) == {"flux-plan", "flux-progress", "flux-summary", "flux-gallery"}
    assert found["flux-progress"].data == 100
    assert str(found["flux-gallery"].data).count("data:image/jpeg;base64,") == 2
    async with get_client() as client:
        assert (await client.read_flow_run(UUID(run))).name == "2 requests · 2 images"


async def test_an_unreachable_server_does_not_fail_the_block(caplog: pytest.LogCaptureFixture) -> None:
    """A warning in the log states that the artifact is out of date."""
    progress = Progress(1)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        async with live_progress(progress, LOGGER, every=0.01):
            progress.add(published_record(1))
    assert "The progress artifact is out of date" in caplog.text


async def test_a_block_that_fails_is_not_delayed() -> None:
    """Its own error is raised at once."""
    with pytest.raises(RuntimeError, match="own"):
        async with live_progress(Progress(1), LOGGER):
            raise RuntimeError("its own")


def _finish(records: list[ItemRecord], bucket: ImageBucket, folder: Path) -> BatchReport:
    manifest = f"{bucket.uri}/manifests/run-1/manifest.jsonl"
    return make_report(records, folder).model_copy(update={"manifest": manifest})


async def _leave(report: BatchReport, records: list[ItemRecord], bucket: ImageBucket, folder: Path) -> str:
    @flow
    async def batch() -> str:
        await publish_artifacts(report, records, bucket, Spool(folder / "spool"), LOGGER)
        return str(flow_run.id)

    return await batch()
