"""From the form to the images, as a person does it: both of Prefect's UIs show them, one of them starts the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio.to_thread
import pytest
import pytest_asyncio
from playwright.async_api import Locator, Page, expect
from prefect.blocks.core import Block
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.leaks import OTHER_API_KEY
from support.team import Team

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox

from .prefect_ui import VERSIONS, PrefectUI, shoot
from .prompts import HOSTILE, as_table, shown
from .stage import copy_to_disk

pytestmark = pytest.mark.asyncio(loop_scope="module")

BATCH = "publish-batch/on-demand"
RUN_SECONDS = 90
PROMPTS = {**HOSTILE, "plain": "a lighthouse at dusk"}


@pytest.fixture(params=VERSIONS)
def ui(request: pytest.FixtureRequest, page: Page, team: Team) -> PrefectUI:
    """A tab on one of the two versions."""
    return PrefectUI(page, request.param, team.url.removesuffix("/api"))


@pytest_asyncio.fixture(loop_scope="module")
async def table(bucket: ImageBucket) -> str:
    """A prompt table in the bucket, with seeds that no other has; its address."""
    await bucket.write_path("in/prompts.csv", as_table(PROMPTS, first_seed=uuid4().int % 2**31 + 1))
    return f"{bucket.uri}/in/prompts.csv"


@pytest_asyncio.fixture(loop_scope="module")
async def saved(team: Team, bucket: ImageBucket, credentials: AimlApiCredentials) -> None:
    """The two blocks that the deployments name."""
    with temporary_settings({PREFECT_API_URL: team.url}):
        await bucket.asave("catalogue", overwrite=True)
        await credentials.asave("studio", overwrite=True)


@pytest.mark.usefixtures("saved")
async def test_a_run_from_the_form_ends_in_images(
    page: Page,
    team: Team,
    table: str,
    bucket: ImageBucket,
    sandbox: RunningSandbox,
    screenshots: Path,
    tmp_path: Path,
) -> None:
    """Form, run, gallery and the page in the bucket: every image is seen, and hostile text is text everywhere.

    The run is started from the newer UI's form, and looked at in both.
    """
    uis = [PrefectUI(page, version, team.url.removesuffix("/api")) for version in VERSIONS]
    before = {run.id for run in team.runs(BATCH)}
    await uis[0].open_run_form(str(team.find(BATCH).id))
    await uis[0].fill("source", table)
    await uis[0].fill("bucket", "catalogue")
    await uis[0].choose_block("credentials", "studio")
    await uis[0].fill("max_in_flight", "3")
    await uis[0].shoot(str(screenshots / "form.png"))
    await uis[0].start_run()
    run = next(run for run in team.runs(BATCH) if run.id not in before)
    for ui in uis:
        await ui.open(f"runs/flow-run/{run.id}")
        await ui.expect_state("Completed", RUN_SECONDS)
        await ui.shoot(str(screenshots / f"run-{ui.version}.png"))
        await ui.open_artifact(team.artifact(run, "flux-gallery"))
        gallery = ui.page.locator("table")
        await expect_images(gallery)
        await expect_text_alone(gallery, {"tbody", "tr", "td", "a", "img", "div", "span", "small", "strong"})
        await ui.shoot(str(screenshots / f"gallery-{ui.version}.png"))

    assert run.parameters["max_in_flight"] == 3
    assert sandbox.control.summary().billed_calls == len(PROMPTS)

    index = await anyio.to_thread.run_sync(copy_to_disk, bucket, tmp_path)
    await page.goto(index.as_uri())
    await expect_images(page.locator("main"))
    await expect_text_alone(
        page.locator("main"), {"article", "a", "img", "div", "p", "bdi", "details", "summary", "pre"}
    )
    await expect_filter(page)
    await expect_request(page)
    await shoot(page, str(screenshots / "index.png"))


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize(
    ("parameter", "wrong", "reason"),
    [
        ("max_in_flight", "0", "0 is less than the minimum of 1"),
        ("density", '"stepz"', "'stepz' is not one of"),
        ("dry_run", '"perhaps"', "'perhaps' is not of type 'boolean'"),
    ],
)
async def test_a_wrong_value_is_refused_in_the_form(
    ui: PrefectUI, team: Team, parameter: str, wrong: str, reason: str, screenshots: Path
) -> None:
    """Out of its bounds, misspelt, or of another type: the form says so, and there is no run."""
    before = {run.id for run in team.runs(BATCH)}
    await ui.open_run_form(str(team.find(BATCH).id))
    await ui.fill("source", "s3://images/prompts.csv")
    if wrong.isdigit():
        await ui.fill(parameter, wrong)
    else:
        await ui.fill_json(parameter, wrong)
    await ui.press("Submit")
    await expect_refusal(ui, parameter, reason)
    await ui.shoot(str(screenshots / f"refused-{parameter}-{ui.version}.png"))

    assert {run.id for run in team.runs(BATCH)} == before


async def test_a_block_from_its_form_is_loaded_by_name(ui: PrefectUI, team: Team, screenshots: Path) -> None:
    """Saved in the browser, both blocks have in Python what was typed, and their defaults for the rest."""
    await ui.open("blocks/catalog/aimlapi-credentials/create")
    await ui.fill("Name" if ui.version == "v2" else "Block Name", f"account-{ui.version}")
    await ui.fill("API key", OTHER_API_KEY)
    await ui.fill("Max In Flight", "5")
    await ui.shoot(str(screenshots / f"credentials-{ui.version}.png"))
    await ui.save_block()
    await ui.open("blocks/catalog/image-bucket/create")
    await ui.fill("Name" if ui.version == "v2" else "Block Name", f"bucket-{ui.version}")
    await ui.fill("Bucket Name", "images")
    await ui.fill("Prefix", "shop")
    await ui.shoot(str(screenshots / f"bucket-{ui.version}.png"))
    await ui.save_block()

    with temporary_settings({PREFECT_API_URL: team.url}):
        credentials: AimlApiCredentials = await AimlApiCredentials.aload(f"account-{ui.version}")
        bucket: ImageBucket = await ImageBucket.aload(f"bucket-{ui.version}")
    assert credentials.api_key.get_secret_value() == OTHER_API_KEY
    assert fields(credentials) == fields(AimlApiCredentials(api_key=credentials.api_key, max_in_flight=5))
    assert fields(bucket) == fields(ImageBucket(bucket_name="images", prefix="shop"))


def fields(block: Block) -> dict[str, Any]:
    """What a block holds, whatever its name."""
    return block.model_dump(include=set(type(block).model_fields))


async def expect_refusal(ui: PrefectUI, parameter: str, reason: str) -> None:
    """The form says what is wrong: the browser itself, where it knows the bound, else the server."""
    if ui.version == "v2" and parameter == "max_in_flight":
        assert await ui.field(parameter).evaluate("input => input.validity.rangeUnderflow")
    else:
        await expect(ui.page.get_by_text(reason).first).to_be_visible()


async def expect_images(within: Locator) -> None:
    """There is an image of each row, and each is seen."""
    images = within.locator("img")
    await expect(images).to_have_count(len(PROMPTS))
    for image in await images.all():
        await image.scroll_into_view_if_needed()
        assert await image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


async def expect_text_alone(within: Locator, ours: set[str]) -> None:
    """All prompts and ids are there to be read, and no element or link that is not ours."""
    text = shown(await within.inner_text())
    for row_id, prompt in HOSTILE.items():
        assert shown(row_id) in text
        assert shown(prompt) in text
    assert set(await within.evaluate("top => [...top.querySelectorAll('*')].map(one => one.localName)")) <= ours
    assert "a.example" not in await within.evaluate("top => [...top.querySelectorAll('a')].map(one => one.href).join()")


async def expect_filter(page: Page) -> None:
    """Words of a prompt leave its row alone; a status leaves its rows."""
    search, rows = page.get_by_role("searchbox"), page.locator("article:visible")
    await search.fill("dusk LIGHTHOUSE")
    await expect(rows).to_have_count(1)
    await expect(page.locator("output")).to_have_text(f"1 of {len(PROMPTS)}")
    await search.fill("")
    await page.get_by_role("button", name="published").click()
    await expect(rows).to_have_count(len(PROMPTS))


async def expect_request(page: Page) -> None:
    """A click shows all of a row's request."""
    row = page.locator("article", has_text="lighthouse")
    details = row.locator("pre")
    await expect(details).not_to_be_visible()
    await row.get_by_text("details", exact=True).click()
    await expect(details).to_be_visible()
    request = json.loads(await details.inner_text())["request"]
    assert request["prompt"] == PROMPTS["plain"]
    assert request["model"] == "flux/kontext-max/text-to-image"
