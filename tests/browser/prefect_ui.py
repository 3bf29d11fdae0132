"""What a person does in Prefect's UI, in the same words for both of its versions.

They are found by what is written on them, as a person finds them: neither version ties all of its labels to inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from playwright.async_api import Locator, Page, TimeoutError, expect  # noqa: A004 - its own kind
from prefect.client.schemas.objects import Artifact

Version = Literal["v1", "v2"]
VERSIONS: tuple[Version, ...] = ("v2", "v1")

_INPUT = "*[self::input or self::textarea]"
_PATHS: dict[Version, str] = {"v1": "", "v2": "/v2"}
_ANY_LENGTH = 8000
_PRESSES = 3
_ANSWER_SECONDS = 20


@dataclass(frozen=True)
class PrefectUI:
    """A page of one of the two versions.

    Attributes:
        page: the browser's.
        version: v2 is under /v2, v1 under /.
        server: the root of the server.
    """

    page: Page
    version: Version
    server: str

    async def open(self, path: str) -> None:
        """Go to an address below the version's root."""
        await self.page.goto(f"{self.server}{_PATHS[self.version]}/{path}")

    async def open_run_form(self, deployment: str) -> None:
        """Go to the form of a custom run."""
        await self.open(f"deployments/deployment/{deployment}/run")
        await self.page.get_by_role("heading", name="Parameters").wait_for()
        await self.field("Run Name").wait_for()

    def field(self, label: str) -> Locator:
        """The input under a label."""
        return self._under(label, _INPUT)

    async def fill(self, label: str, value: str) -> None:
        """Type a value in place of what is there."""
        await self.field(label).fill(value)

    async def choose(self, label: str, option: str) -> None:
        """Take an option, or one type of several, from what stands under a label."""
        await self._under(label, f"button[normalize-space()='{option}']").click()

    async def choose_block(self, label: str, name: str) -> None:
        """Switch a parameter to a saved block and take that of the name from the list, in v2."""
        await self.choose(label, "Saved block")
        await self._under(label, "button[@aria-label='Select a block']").click()
        await self.page.get_by_text(name, exact=True).last.click()

    async def fill_json(self, label: str, text: str) -> None:
        """Switch a parameter to JSON, which takes any value, and type it."""
        await self._under(label, "button").click()
        await self.page.get_by_text(re.compile("use json input", re.IGNORECASE)).click()
        editor = self._under(label, "*[contains(@class, 'p-code-input__textarea') or @contenteditable='true']")
        await editor.click()
        await editor.press("Control+a")
        await self.page.keyboard.insert_text(text)

    async def press(self, *names: str) -> None:
        """Press the button that has one of these names."""
        await self.page.get_by_role("button", name=re.compile(f"^({'|'.join(names)})$")).click()

    async def start_run(self) -> None:
        """Press the button below the form of a custom run until the server has taken the run."""
        await self._send("/create_flow_run", "Submit")

    async def save_block(self) -> None:
        """Press the button below a block's form until the block's page is there."""
        await self._send("/block_documents/", "Save", "Create")
        await self.page.wait_for_url("**/blocks/block/**")

    async def open_artifact(self, artifact: Artifact) -> None:
        """From a run's page to one of its artifacts, click by click."""
        await self.page.get_by_text("Artifacts", exact=True).last.click()
        if self.version == "v2":  # it leads to the history of the key first
            await self.page.locator(f"a[href$='/artifacts/key/{artifact.key}']").first.click()
        await self.page.locator(f"a[href$='/artifacts/artifact/{artifact.id}']").first.click()

    async def shoot(self, path: str) -> None:
        """Keep an image of the whole page, without the edges of what scrolls inside of it."""
        await shoot(self.page, path)

    async def expect_state(self, state: str, seconds: float) -> None:
        """Look at a run's page until it shows the state."""
        await expect(self.page.get_by_text(state, exact=True).first).to_be_visible(timeout=1000 * seconds)

    async def _send(self, path: str, *names: str) -> None:
        """Press a button until the server has taken what it sends to a path.

        A press is repeated as a person repeats it: where the server refuses the write, as Prefect's does while
        SQLite is locked (neither UI asks again of itself), or where the press led to nothing.
        """
        came_of_it: list[int | str] = []
        for _ in range(_PRESSES):
            try:
                async with self.page.expect_response(
                    lambda response: response.request.method == "POST" and response.url.endswith(path),
                    timeout=_ANSWER_SECONDS * 1000,
                ) as answer:
                    await self.press(*names)
                response = await answer.value
            except TimeoutError:
                came_of_it.append("nothing")
                continue
            if response.ok:
                return
            came_of_it.append(response.status)
        said = await self.page.locator("body").inner_text()
        raise AssertionError(f"{_PRESSES} presses of {names}: {came_of_it}; the page: {said}")

    def _under(self, label: str, what: str) -> Locator:
        named = f"//*[normalize-space(text())='{label}' or normalize-space(text())='{label} (Optional)']"
        return self.page.locator(f"xpath={named}/following::{what}").first


async def shoot(page: Page, path: str) -> None:
    """Keep an image of a whole page: made as high as the highest thing that scrolls in it."""
    before = page.viewport_size
    assert before is not None
    height = await page.evaluate(
        "Math.max(...[document.documentElement, ...document.querySelectorAll('*')]"
        ".filter(e => e === document.documentElement || /auto|scroll/.test(getComputedStyle(e).overflowY))"
        ".map(e => e.scrollHeight + innerHeight - Math.min(e.clientHeight, innerHeight)))"
    )
    await page.set_viewport_size({"width": before["width"], "height": min(_ANY_LENGTH, max(before["height"], height))})
    await page.screenshot(path=path)
    await page.set_viewport_size(before)
