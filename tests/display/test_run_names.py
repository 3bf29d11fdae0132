"""The names of flow runs."""

from __future__ import annotations

from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flux_prefect.display.run_names import initial_run_name, planned_run_name, rename_run
from flux_prefect.manifest.plan import Plan


def _plan(images: int, paid: int = 0) -> Plan:
    return Plan(
        rows=300,
        invalid=0,
        published=300 - images - paid,
        repeats=0,
        paid=paid,
        requests=images,
        images=images,
        most_credits=0,
        max_credits=None,
        max_images=None,
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("tables/nightly-products.csv", "nightly-products.csv"),
        ("s3://bucket/tables/nightly products.csv", "nightly products.csv"),
        ("https://host/a/list.jsonl?X-Amz-Signature=secret", "list.jsonl"),
        ([{}, {}], "2 requests"),
    ],
)
def test_a_runs_name_has_its_table_and_its_images(source: str | list[object], name: str) -> None:
    """The table's name, and the number of images once there is a plan; nothing secret."""
    assert initial_run_name(source) == f"publish {name}"
    assert planned_run_name(source, _plan(213, paid=1)) == f"{name} · 214 images"
    assert planned_run_name(source, _plan(1)) == f"{name} · 1 image"
    assert planned_run_name(source, _plan(0)) == f"{name} · nothing new"


@pytest.mark.usefixtures("prefect_server")
class TestRenaming:
    """With a real Prefect server."""

    async def test_the_initial_name_is_replaced(self) -> None:
        """On the server and in the context of the run."""

        @flow(flow_run_name="publish a.csv")
        async def renamed() -> tuple[str, str]:
            await rename_run("a.csv · 2 images", instead_of="publish a.csv")
            return str(flow_run.id), str(flow_run.name)

        identity, name = await renamed()
        async with get_client() as client:
            assert (await client.read_flow_run(UUID(identity))).name == name == "a.csv · 2 images"

    async def test_a_name_that_a_user_chose_is_kept(self) -> None:
        """Such as that of `publish_batch.with_options(flow_run_name=…)`."""

        @flow(flow_run_name="Christmas")
        async def chosen() -> str:
            await rename_run("a.csv · 2 images", instead_of="publish a.csv")
            return str(flow_run.id)

        identity = await chosen()
        async with get_client() as client:
            assert (await client.read_flow_run(UUID(identity))).name == "Christmas"


async def test_outside_a_run_nothing_happens() -> None:
    """There is no run to rename."""
    await rename_run("x", instead_of="y")
