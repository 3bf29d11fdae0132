"""One import line: every public name is in the root of the package, once, and loaded when it is first used."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from pkgutil import iter_modules

import pytest
from prefect.blocks.core import Block

import flux_prefect
from flux_prefect import errors

SOURCE = Path(flux_prefect.__file__)
OWNERS = {
    alias.name: statement.module
    for typed in ast.parse(SOURCE.read_text(encoding="utf-8")).body
    if isinstance(typed, ast.If)
    for statement in typed.body
    if isinstance(statement, ast.ImportFrom) and statement.module is not None
    for alias in statement.names
}
"""The modules of the names as a type checker reads them."""


def run_fresh(code: str) -> str:
    """What Python code prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_name_is_there() -> None:
    """`__all__` holds what a type checker reads, the whole error tree and the version; each is the owner's object."""
    assert sorted(flux_prefect.__all__) == sorted({*OWNERS, *errors.__all__, "__version__"})
    for name, module in OWNERS.items():
        assert getattr(flux_prefect, name) is getattr(import_module(module), name)


def test_the_error_tree_is_whole() -> None:
    """Every error of the package, and nothing beside it but what an error states about money."""
    tree = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, Exception)}

    assert set(errors.__all__) == tree | {"Billed"}


@pytest.mark.parametrize("room", ["flux_prefect.flows", "flux_prefect.tasks"])
def test_all_flows_and_tasks_are_public(room: str) -> None:
    """But the flow that a sharded batch starts for itself."""
    module = import_module(room)
    modules = [import_module(f"{room}.{each.name}") for each in iter_modules(getattr(module, "__path__", ()))]
    runnable = {
        name
        for each in modules or [module]
        for name, value in vars(each).items()
        if type(value).__module__.startswith("prefect.") and getattr(value, "__module__", None) == each.__name__
    }

    assert runnable - {"publish_shard"} <= set(flux_prefect.__all__)
    assert runnable


def test_a_name_is_no_submodule() -> None:
    """Importing a submodule never puts a module in the place of a public name."""
    submodules = {module.name for module in iter_modules(flux_prefect.__path__)}

    assert submodules & set(flux_prefect.__all__) == set()


def test_importing_the_package_imports_no_prefect() -> None:
    """Nor anything else that takes long; the version needs none of it either."""
    code = "import sys, flux_prefect; flux_prefect.__version__; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run_fresh(code).split()}

    assert loaded & {"prefect", "pydantic", "httpx", "boto3", "aiohttp", "PIL"} == set()


def test_a_submodule_can_be_imported_before_the_names() -> None:
    """A flow's module and the flow of the same name keep apart."""
    code = (
        "import flux_prefect.flows.publish_batch, flux_prefect.tasks\n"
        "from flux_prefect import publish_batch, tasks\n"
        "print(type(publish_batch).__name__, type(flux_prefect.flows.publish_batch).__name__, tasks.__name__)"
    )
    assert run_fresh(code).split() == ["Flow", "module", "flux_prefect.tasks"]


def test_all_names_come_by_a_star() -> None:
    """`from flux_prefect import *` in a fresh process loads every one of them."""
    code = "from flux_prefect import *; import flux_prefect; print(set(flux_prefect.__all__) - set(globals()))"

    assert run_fresh(code).strip() == "set()"


def test_the_version_is_the_distribution_s() -> None:
    """Stated once, in pyproject.toml."""
    assert flux_prefect.__version__ == metadata.version("flux_prefect")


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="module 'flux_prefect' has no attribute 'generate_images'"):
        _ = flux_prefect.generate_images  # type: ignore[attr-defined] # a checker finds it as well


def test_the_root_holds_two_blocks() -> None:
    """`prefect block register -m flux_prefect` looks at every name in `dir`."""
    blocks = {each for _, each in inspect.getmembers(flux_prefect) if Block.is_block_class(each)}

    assert blocks == {flux_prefect.AimlApiCredentials, flux_prefect.ImageBucket}
