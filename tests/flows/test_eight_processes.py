"""Eight processes over one table at once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from uuid import uuid4

from support.nursery import Nursery

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.host.spool import Spool
from flux_prefect.sandbox.launching import RunningSandbox

PROCESSES, ROWS = 8, 100


def test_eight_processes_over_a_hundred_prompts_pay_a_hundred_times(
    nursery: Nursery, sandbox: RunningSandbox, bucket: ImageBucket, tmp_path: Path
) -> None:
    """Each image is paid for, downloaded and published by one of them and found by the others; none fails."""
    sandbox.control.settings(latency=0.3, fast=True, fast_bytes=20_000)
    table, name = tmp_path / "prompts.jsonl", uuid4().hex
    table.write_text("\n".join(json.dumps({"prompt": f"{name} {seed}", "seed": seed}) for seed in range(1, ROWS + 1)))
    spool = Spool(tmp_path / "spool")
    batches = [
        nursery.start(
            tmp_path / str(number),
            *(str(table), "--bucket", bucket.uri, "--density", "chunks", "--max-in-flight", "8"),
            FLUX_PREFECT_SPOOL=str(spool.root),
        )
        for number in range(PROCESSES)
    ]
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(batch.finish())

    assert counts == {"published": ROWS, "unchanged": ROWS * (PROCESSES - 1)}
    totals = sandbox.control.summary()
    assert (totals.calls, totals.billed_calls, totals.downloads) == (ROWS, ROWS, ROWS)
    listed = bucket.get_client().list_objects_v2(Bucket="images", Prefix=bucket.prefix)["Contents"]
    assert sum(entry["Key"].endswith(".jpg") for entry in listed) == ROWS
    assert spool.open_calls() == []
