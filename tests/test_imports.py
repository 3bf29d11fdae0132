"""Imports run one way: api, then what stands on it, tasks, pipeline, batch, flows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flux_prefect

ROOT = Path(flux_prefect.__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("flux_prefect", "flows")
    for path in (ROOT / package).rglob("*.py")
)
OURS = ("flux_prefect", "flows")

LAYERS = (
    ("flux_prefect.api",),
    tuple(
        f"flux_prefect.{name}"
        for name in (
            "naming",
            "caching",
            "locking",
            "credentials",
            "bucket",
            "conditional",
            "leases",
            "spool",
            "seeds",
            "settings",
            "steps",
            "budget",
            "inline",
            "reconciling",
        )
    ),
    ("flux_prefect.blocks",),
    ("flux_prefect.tasks",),
    ("flux_prefect.pipeline",),
    ("flux_prefect.batch",),
    ("flux_prefect.shell", "flux_prefect.forms"),
    ("flows",),
    ("flux_prefect.demo",),  # the only one that starts the stand-in
)
SANDBOX = "flux_prefect.sandbox"


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _layer(module: str) -> int | None:
    found = [number for number, layer in enumerate(LAYERS) if any(_is_in(module, package) for package in layer)]
    return found[0] if found else None


def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(module: str) -> Iterator[str]:
    """The modules that a module imports, anywhere in it."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is(module: str) -> None:
    """Every module has a docstring."""
    assert ast.get_docstring(_tree(module))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_its_place(module: str) -> None:
    """A new module is put into a layer, so that its imports are held to it."""
    assert _layer(module) is not None or module in OURS or _is_in(module, SANDBOX)


@pytest.mark.parametrize("module", [module for module in MODULES if _layer(module) is not None])
def test_imports_run_one_way(module: str) -> None:
    """A module imports its own layer and those below, never one above."""
    layer = _layer(module)
    assert layer is not None
    for imported in _imports(module):
        assert module == "flux_prefect.demo" or not _is_in(imported, SANDBOX), f"{module} needs the stand-in"
        below = _layer(imported)
        assert below is None or below <= layer, f"{module} imports {imported} from above"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_from_the_root(module: str) -> None:
    """A name comes from the module that owns it, and the package never needs its flows."""
    for imported in _imports(module):
        assert imported not in OURS, f"{module} imports from the root of {imported}"
        assert _is_in(module, "flows") or not _is_in(imported, "flows"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", [module for module in MODULES if _is_in(module, "flux_prefect.api")])
def test_the_api_knows_neither_prefect_nor_the_rest(module: str) -> None:
    """The client of the service can be used where there is no Prefect."""
    for imported in _imports(module):
        assert not _is_in(imported, "prefect"), f"{module} imports {imported}"
        assert not _is_in(imported, "flux_prefect") or _is_in(imported, "flux_prefect.api"), f"{module}: {imported}"


@pytest.mark.parametrize("module", [module for module in MODULES if _is_in(module, SANDBOX)])
def test_the_sandbox_stands_apart(module: str) -> None:
    """The stand-in shares the models of the API with the package, and nothing that could hide a mistake in both."""
    for imported in _imports(module):
        if _is_in(imported, "flux_prefect"):
            allowed = imported == "flux_prefect.api.models" or _is_in(imported, SANDBOX)
            assert allowed, f"{module} imports {imported}"
