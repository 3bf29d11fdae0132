"""A team's Prefect with its UI, and a browser in front of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, Page
from support.missing import do_without
from support.team import Team

from flux_prefect.sandbox.launching import RunningSandbox

from .chromium import HEIGHT, WIDTH, NoChromium, find_chromium, open_browser
from .stage import open_stage


@pytest.fixture(scope="session")
def chromium() -> None:
    """That there is one."""
    try:
        find_chromium()
    except NoChromium as error:
        do_without(error)


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images of what the browser showed are kept: in FLUX_PREFECT_SCREENSHOTS, else in pytest's own folder."""
    named = os.environ.get("FLUX_PREFECT_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def team(
    chromium: None,  # noqa: ARG001 - without it nothing is started
    running_sandbox: RunningSandbox,  # noqa: ARG001 - what the worker runs needs it
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Team]:
    """A server with both UIs, all deployments, the types of our blocks, and a worker."""
    with open_stage(tmp_path_factory.mktemp("team")) as team:
        yield team


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def context(chromium: None) -> AsyncIterator[BrowserContext]:  # noqa: ARG001 - without it there is no browser
    """A browser without a past."""
    async with open_browser() as browser:
        context = await browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
        yield context
        await context.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(context: BrowserContext) -> AsyncIterator[Page]:
    """A tab. A test in which a page opens a dialogue, as a script in a prompt would, fails."""
    page = await context.new_page()
    dialogues: list[str] = []
    page.on("dialog", lambda dialogue: dialogues.append(dialogue.message))
    yield page
    await page.close()
    assert dialogues == []
