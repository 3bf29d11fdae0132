"""The examples in the docstrings of the public names, run as they stand.

An example finds what its reader has at hand: every public name, `credentials`, `bucket`, a `request`, the service's
`url` and `key`, and a table `prompts.csv`, in the folder and in the bucket.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import re
import textwrap
from collections.abc import AsyncIterator
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient
from pydantic import BaseModel

import flux_prefect
from flux_prefect import AimlApiCredentials, ImageBucket, ImageRequest
from flux_prefect.flows.publish_shard import publish_shard

RETURNED = {"RunningSandbox", "Table"}
"""Classes that functions return and users do not construct."""


def _documented() -> dict[str, str]:
    """The docstrings of the public functions and classes, and of the public methods of these, by name."""
    found = {}
    for name in flux_prefect.__all__:
        value = getattr(flux_prefect, name)
        members = vars(value) if isinstance(value, type) else {}
        methods = {f"{name}.{each}": member for each, member in members.items() if not each.startswith("_")}
        for each, documented in {name: value, **methods}.items():
            if (text := getattr(documented, "__doc__", None)) and callable(documented):
                found[each] = inspect.cleandoc(text)
    return found


EXAMPLES = {
    f"{name}-{number}" if number else name: textwrap.dedent(code)
    for name, text in _documented().items()
    for number, code in enumerate(re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL))
}


def _is_called(value: Any) -> bool:
    """Whether a user calls it: a function, a task, a flow, a block, or a class that is no record and no error."""
    if not isinstance(value, type):
        return callable(value) and getattr(value, "__module__", "").startswith("flux_prefect")
    if issubclass(value, Block):
        return True
    record = issubclass(value, (BaseModel, Enum, Exception)) or dataclasses.is_dataclass(value)
    return value is flux_prefect.FluxError or value is flux_prefect.PromptSeedCachePolicy or not record


@pytest.mark.parametrize(
    "name", [name for name in flux_prefect.__all__ if _is_called(getattr(flux_prefect, name)) and name not in RETURNED]
)
def test_what_a_user_calls_has_an_example(name: str) -> None:
    """In its own docstring, which an editor shows."""
    assert name in EXAMPLES


@pytest.fixture
async def shard_deployment(prefect_server: str) -> AsyncIterator[None]:
    """The deployment that a sharded batch starts its shards by, without a worker."""
    deployment = await (await publish_shard.ato_deployment("worker")).aapply()
    yield
    async with PrefectClient(prefect_server) as client:
        await client.delete_deployment(deployment)


@pytest.mark.usefixtures("prefect_server", "shard_deployment")
@pytest.mark.parametrize("name", EXAMPLES)
async def test_an_example_runs(
    name: str, credentials: AimlApiCredentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the body of a flow, a sync one where it awaits nothing, in a folder and a bucket with a table in it."""
    bucket = ImageBucket.from_uri("s3://images")
    await credentials.save("studio", overwrite=True)
    await bucket.save("studio", overwrite=True)
    table = f"id,prompt,seed\nfox,a fox in the snow {uuid4().hex},7\nowl,an owl at night,8\n"
    (tmp_path / "prompts.csv").write_text(table, encoding="utf-8")
    await bucket.write_path("prompts.csv", table.encode())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {each: getattr(flux_prefect, each) for each in flux_prefect.__all__} | {
        "__name__": "example",
        "bucket": bucket,
        "credentials": credentials,
        "key": credentials.api_key,
        "request": ImageRequest(prompt=f"a lighthouse at dusk {uuid4().hex}", seed=7),
        "url": credentials.base_url,
    }
    text = EXAMPLES[name].replace("BLOCK_NAME", "studio")  # Prefect's own word, which no name may be
    code = compile(text, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    @flow(name="example")
    async def follow() -> None:
        await eval(code, names)  # noqa: S307 - the package's own code

    @flow(name="example")
    def follow_without_await() -> None:
        eval(code, names)  # noqa: S307 - the package's own code

    if code.co_flags & inspect.CO_COROUTINE:
        await follow()
    else:
        await asyncio.to_thread(follow_without_await)
