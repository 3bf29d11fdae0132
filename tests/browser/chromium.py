"""The system's own Chromium, driven through Playwright, which downloads no browser of its own here."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, async_playwright

VARIABLE = "FLUX_PREFECT_TEST_BROWSER"
WIDTH, HEIGHT = 1280, 900

_FLAGS = (
    "--no-sandbox",  # as root it has none
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the UIs ask for logos and fonts out there
)


class NoChromium(Exception):
    """There is no Chromium on this machine; the message says what to do."""


def find_chromium() -> str:
    """The path of the browser: what FLUX_PREFECT_TEST_BROWSER names, else `chromium` on the PATH.

    Raises:
        NoChromium: neither is there.
    """
    named = os.environ.get(VARIABLE, "chromium")
    found = shutil.which(named)
    if found is None:
        raise NoChromium(
            f"No browser {named!r}: install Debian's package chromium, or set {VARIABLE} to a Chromium's path."
        )
    return found


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    """A browser of its own, in about a second.

    Raises:
        NoChromium: there is none on this machine.
    """
    path = find_chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield browser
        finally:
            await browser.close()
