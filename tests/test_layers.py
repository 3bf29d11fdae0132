"""Imports run downwards only, and every module has its room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flux_prefect

ROOT = Path(flux_prefect.__file__).parent.parent
PACKAGE = "flux_prefect"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / PACKAGE).rglob("*.py")
)

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "concurrency", "local_files"),
    ("api",),
    ("settings", "seeds", "inline"),
    ("host",),
    ("credentials", "bucket"),
    ("blocks", "cache_policies", "money"),
    ("custody",),
    ("tasks",),
    ("pipeline",),
    ("tables",),
    ("manifest",),
    ("display",),
    ("batch",),
    ("sharding",),
    ("flows",),
    ("forecast",),
    ("cli",),
)
"""The rooms from the ground up. A module imports its own room and those on the floors below."""

SANDBOX = f"{PACKAGE}.sandbox"


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _floor(module: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if _room(module) in rooms), None)


def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: what only a type checker reads has no direction."""
    for child in ast.iter_child_nodes(node):
        if not _is_typing_only(child):
            yield child
            yield from _statements(child)


def _imports(module: str) -> Iterator[str]:
    """The modules that a module imports, anywhere in it."""
    for node in _statements(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def _is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is(module: str) -> None:
    """Every module has a docstring."""
    assert ast.get_docstring(_tree(module))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_its_room(module: str) -> None:
    """A new room is given a floor, so that its imports are held to it."""
    assert _floor(module) is not None or module == PACKAGE or _room(module) == "sandbox"


@pytest.mark.parametrize("module", [module for module in MODULES if _floor(module) is not None])
def test_imports_run_downwards(module: str) -> None:
    """A module imports from its own room and the floors below, never from one above."""
    floor = _floor(module)
    assert floor is not None
    for imported in filter(_is_ours, _imports(module)):
        if _room(imported) == "sandbox":
            assert _room(module) == "cli", f"{module} needs the sandbox"
            continue
        below = _floor(imported)
        assert below is not None, f"{module} imports from the root of the package"
        assert below <= floor, f"{module} imports {imported} from above"


@pytest.mark.parametrize("module", [module for module in MODULES if _room(module) in {"api", *FLOORS[0]}])
def test_the_api_needs_no_prefect(module: str) -> None:
    """The client of the service can be used where there is no Prefect."""
    for imported in _imports(module):
        assert imported.split(".")[0] != "prefect", f"{module} imports {imported}"


@pytest.mark.parametrize("module", [module for module in MODULES if _room(module) == "sandbox"])
def test_the_sandbox_stands_apart(module: str) -> None:
    """The sandbox shares the models of the API and their registry, which other tests hold to the documents."""
    for imported in filter(_is_ours, _imports(module)):
        allowed = imported in {f"{PACKAGE}.api.models", f"{PACKAGE}.api.registry"} or _room(imported) == "sandbox"
        assert allowed, f"{module} imports {imported}"
