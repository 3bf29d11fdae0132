"""The flows to copy: each is deployed, run, and does what it says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from chosen_seeds import publish_chosen, try_seeds
from prefect.client.schemas.objects import State
from products_to_catalogue import products_to_catalogue
from support.deployed_runs import run_deployment

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import BatchFailed, TableError
from flux_prefect.sandbox.launching import RunningSandbox
from flux_prefect.tables.parquet import load_pyarrow

FLOWS = Path(__file__).parents[2] / "flows"
TEMPLATE = "a {{ colour }} {{ name }}"
SERVE = """
from prefect import serve
from chosen_seeds import publish_chosen, try_seeds
from feed_covers import feed_covers
from nightly_table import nightly_table
from products_to_catalogue import products_to_catalogue
flows = [nightly_table, products_to_catalogue, feed_covers, try_seeds, publish_chosen]
serve(*(flow.to_deployment("copied") for flow in flows), limit=4)
"""

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def served(
    prefect_server: str, running_sandbox: RunningSandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A process that serves every composition, started in their folder as somebody who copied it would."""
    environment = {
        **os.environ,
        **running_sandbox.environment,
        "PREFECT_API_URL": prefect_server,
        "FLUX_PREFECT_SPOOL": str(tmp_path_factory.mktemp("served") / "spool"),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    }
    with subprocess.Popen([sys.executable, "-c", SERVE], cwd=FLOWS, env=environment) as process:
        yield
        process.terminate()


@pytest.fixture
def feed(tmp_path: Path) -> Iterator[str]:
    """The address of a JSON Feed with two posts."""
    (tmp_path / "feed.json").write_text(
        json.dumps({"items": [{"id": uuid4().hex, "title": title} for title in ("On bread", "On salt")]}),
        encoding="utf-8",
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/feed.json"
        server.shutdown()


def products(**changes: Any) -> dict[str, list[Any]]:
    """Two products that no other test has."""
    lot = uuid4().hex
    return {"sku": [7, 8], "name": [f"mug {lot}", f"lamp {lot}"], "colour": ["red", "brass"], **changes}


async def put(bucket: ImageBucket, columns: dict[str, list[Any]]) -> str:
    """Write a product table into the bucket; its address."""
    pyarrow, parquet = load_pyarrow()
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    await bucket.write_path("in/products.parquet", file.getvalue())
    return f"{bucket.uri}/in/products.parquet"


async def read_catalogue(bucket: ImageBucket) -> list[dict[str, Any]]:
    """The rows of the catalogue."""
    content = await bucket.read_path("catalogue/products.parquet")
    _, parquet = load_pyarrow()
    rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(content)).to_pylist()
    return rows


async def run(name: str, **parameters: Any) -> State[Any]:
    """Run a composition's deployment to its end."""
    return await run_deployment(f"{name}/copied", parameters)


@pytest.mark.usefixtures("served")
async def test_a_nightly_table(sandbox: RunningSandbox, bucket: ImageBucket, tmp_path: Path) -> None:
    """The second night pays nothing."""
    table = tmp_path / "covers.csv"
    table.write_text(f"id,prompt,seed\none,a fox {uuid4().hex},1\ntwo,an owl {uuid4().hex},2\n", encoding="utf-8")
    for _ in range(2):
        state = await run("nightly-table", table=str(table), bucket=bucket.uri)
        assert state.is_completed(), state.message

    assert sandbox.control.summary().billed_calls == 2


@pytest.mark.usefixtures("served")
async def test_a_cover_for_each_new_post(sandbox: RunningSandbox, bucket: ImageBucket, feed: str) -> None:
    """Run again, posts that have their cover cost nothing."""
    for _ in range(2):
        state = await run("feed-covers", feed=feed, bucket=bucket.uri)
        assert state.is_completed(), state.message

    assert sandbox.control.summary().billed_calls == 2


@pytest.mark.usefixtures("served")
async def test_a_product_table_becomes_a_catalogue(sandbox: RunningSandbox, bucket: ImageBucket) -> None:
    """From its deployment."""
    state = await run(
        "products-to-catalogue",
        products=await put(bucket, products()),
        bucket=bucket.uri,
        template=TEMPLATE,
        id_column="sku",
    )

    assert state.is_completed(), state.message
    assert [row["image_status"] for row in await read_catalogue(bucket)] == ["published"] * 2
    assert sandbox.control.summary().billed_calls == 2


@pytest.mark.usefixtures("served")
async def test_chosen_seeds_become_a_table(sandbox: RunningSandbox, bucket: ImageBucket) -> None:
    """What was tried is not paid for again when it is chosen."""
    prompt = f"a lighthouse {uuid4().hex}"
    tried = await run("try-seeds", prompts=[prompt], bucket=bucket.uri, seeds=[1, 2, 3])
    assert tried.is_completed(), tried.message
    report = await publish_chosen({prompt: 2}, bucket.uri)

    assert report.count("unchanged") == 1
    assert sandbox.control.summary().billed_calls == 3


async def test_a_sweep_leads_to_its_contact_sheets(sandbox: RunningSandbox, bucket: ImageBucket) -> None:
    """One sheet a prompt."""
    sheets = await try_seeds([f"a fox {uuid4().hex}", f"an owl {uuid4().hex}"], bucket.uri, [1, 2])

    assert len(sheets) == 2
    assert all(sheet.startswith(bucket.uri) for sheet in sheets)
    assert sandbox.control.summary().billed_calls == 4


async def test_each_product_gets_its_image_and_keeps_it(sandbox: RunningSandbox, bucket: ImageBucket) -> None:
    """Columns keep their values and types; the next night pays for the product that changed, and for no other."""
    first = products()
    source = await put(bucket, first)
    catalogue = await products_to_catalogue(source, bucket.uri, TEMPLATE, "sku")
    tonight = await read_catalogue(bucket)
    await put(bucket, {**first, "colour": ["red", "copper"]})
    await products_to_catalogue(source, bucket.uri, TEMPLATE, "sku")
    tomorrow = await read_catalogue(bucket)

    assert catalogue == f"{bucket.uri}/catalogue/products.parquet"
    assert [(row["sku"], row["colour"], row["image_status"]) for row in tonight] == [
        (7, "red", "published"),
        (8, "brass", "published"),
    ]
    assert [row["image_status"] for row in tomorrow] == ["unchanged", "published"]
    assert tomorrow[0]["image_uri"] == tonight[0]["image_uri"]
    assert tomorrow[1]["image_uri"] != tonight[1]["image_uri"]
    assert sandbox.control.summary().billed_calls == 3


@pytest.mark.usefixtures("sandbox")
async def test_a_catalogue_is_a_product_table_again(bucket: ImageBucket) -> None:
    """Read as the next run's source, its own columns are replaced, not doubled."""
    catalogue = await products_to_catalogue(await put(bucket, products()), bucket.uri, TEMPLATE, "sku")
    await products_to_catalogue(catalogue, bucket.uri, TEMPLATE, "sku")

    rows = await read_catalogue(bucket)
    assert [row["image_status"] for row in rows] == ["unchanged"] * 2
    assert len(rows[0]) == 3 + 7


async def test_a_product_without_its_image_is_in_the_catalogue_all_the_same(
    sandbox: RunningSandbox, bucket: ImageBucket
) -> None:
    """The run fails and says how many; the table has the others' images and this one's reason."""
    sandbox.control.inject("moderation", times=1)
    with pytest.raises(BatchFailed, match="1 of 2 items without their images"):
        await products_to_catalogue(await put(bucket, products()), bucket.uri, TEMPLATE, "sku")

    rows = await read_catalogue(bucket)
    assert sorted(row["image_status"] for row in rows) == ["failed", "published"]
    (failed,) = (row for row in rows if row["image_status"] == "failed")
    assert failed["image_uri"] is None
    assert failed["image_error"]


@pytest.mark.parametrize(
    ("changes", "template", "reason"),
    [
        ({"sku": [7, 7]}, TEMPLATE, r"Row 2 has no sku of its own: '7'"),
        ({"sku": [None, 8]}, TEMPLATE, r"Row 1 has no sku of its own: ''"),
        ({"name": [None, "lamp"]}, TEMPLATE, r"Row 1 \(7\) can't be rendered: the column 'name' is empty in this row"),
        ({}, "a {{ size }} {{ name }}", r"Row 1 \(7\) can't be rendered: .*'size' is undefined"),
        ({}, "a {{ name", r"template is broken"),
        ({}, "a {{ ['red', 'blue'] | random }} {{ name }}", r"template is broken|No filter named 'random'"),
        ({}, "{{ name.__class__.__mro__ }}", r"Row 1 \(7\) can't be rendered: .*unsafe"),
    ],
)
async def test_nothing_is_paid_for_a_table_that_cannot_be_used(
    changes: dict[str, Any], template: str, reason: str, sandbox: RunningSandbox, bucket: ImageBucket
) -> None:
    """The run ends before the first call, and says which row and why."""
    source = await put(bucket, products(**changes))
    with pytest.raises(TableError, match=reason):
        await products_to_catalogue(source, bucket.uri, template, "sku")

    assert sandbox.control.summary().calls == 0
