"""`make screenshots`: the README's images, from the running UI.

A batch of the example's prompts on the sandbox, started from a deployment. One image is refused on purpose, to show
where the reason stands.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
import tempfile
from pathlib import Path

import anyio.to_thread
from PIL import Image
from playwright.async_api import Locator
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.team import ROOT, Team

from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.sandbox.launching import RunningSandbox, start_sandbox

from .chromium import WIDTH, open_browser
from .prefect_ui import PrefectUI
from .stage import copy_to_disk, open_stage

FOLDER = ROOT / "deployments" / "screenshots"
PROMPTS = ROOT / "flows" / "examples" / "prompts.csv"
DEPLOYMENT = "publish-batch/on-demand"
TABLE = "autumn.csv"

_MOST_BYTES = 250_000
_ACCOUNTS = ("AIML", "AWS_", "FLUX_", "PREFECT_")
_RUN_SECONDS = 120
_TALL, _MARGIN = 3000, 12


def main() -> int:
    """Make the images anew; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="flux_prefect-screenshots-") as name:
        folder = Path(name)
        for variable in [variable for variable in os.environ if variable.startswith(_ACCOUNTS)]:
            del os.environ[variable]  # no personal account, bucket or Prefect is used
        os.environ |= {"PREFECT_HOME": str(folder / "prefect"), "FLUX_PREFECT_SPOOL": str(folder / "spool")}
        with start_sandbox(folder / "sandbox", latency=0.8) as sandbox:
            os.environ |= sandbox.environment
            with open_stage(folder / "stage") as team, temporary_settings({PREFECT_API_URL: team.url}):
                asyncio.run(_take_images(team, sandbox, folder))
    return 0


async def _take_images(team: Team, sandbox: RunningSandbox, folder: Path) -> None:
    await AimlApiCredentials.from_env().asave("studio", overwrite=True)
    bucket = ImageBucket.from_uri("s3://images/catalogue")
    await bucket.asave("catalogue", overwrite=True)
    await bucket.write_path(f"in/{TABLE}", PROMPTS.read_bytes())
    parameters = {"source": f"{bucket.uri}/in/{TABLE}", "max_failed": 1}
    async with open_browser() as browser:
        page = await browser.new_page(viewport={"width": WIDTH, "height": 1000})
        ui = PrefectUI(page, "v2", team.url.removesuffix("/api"))
        sandbox.control.inject("moderation", prompt_contains="Kyoto")
        run = team.client.create_flow_run_from_deployment(team.find(DEPLOYMENT).id, parameters=parameters)
        await ui.open(f"runs/flow-run/{run.id}")
        await ui.expect_state("Completed", _RUN_SECONDS)
        await ui.open_artifact(team.artifact(run, "flux-gallery"))
        await _keep("gallery", page.locator("table tr").nth(1))
        index = await anyio.to_thread.run_sync(copy_to_disk, bucket, folder / "copy")
        await page.goto(index.as_uri())
        await _keep("index", page.locator("article").nth(5))
        await ui.open_run_form(str(team.find(DEPLOYMENT).id))
        for name, value in parameters.items():
            await ui.fill(name, str(value))
        await _keep("form", ui.field("max_credits"))


async def _keep(name: str, last: Locator) -> None:
    """Keep a page down to the end of what comes last, in as many colours as fit."""
    page = last.page
    await last.scroll_into_view_if_needed()
    await page.evaluate("document.activeElement.blur()")
    await page.set_viewport_size({"width": WIDTH, "height": _TALL})
    await page.wait_for_load_state("networkidle")
    box = await last.bounding_box()
    assert box is not None
    await page.set_viewport_size({"width": WIDTH, "height": int(box["y"] + box["height"]) + _MARGIN})
    shot = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
    path = FOLDER / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    for colours in (256, 128, 64):
        palette = shot.quantize(colours)
        shot.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
        if (size := path.stat().st_size) < _MOST_BYTES:
            print(f"{path.relative_to(ROOT)}: {size / 1000:.0f} kB")  # noqa: T201 - this is a command line
            return
    raise ValueError(f"{path} has {size:,} bytes: show less of the page")


if __name__ == "__main__":
    sys.exit(main())
