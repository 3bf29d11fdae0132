"""Every public module states what other modules may import from it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flux_prefect

ROOT = Path(flux_prefect.__file__)  # its names are held by test_public_face
PACKAGE = ROOT.parent
MODULES = sorted(
    path.relative_to(PACKAGE)
    for path in PACKAGE.rglob("*.py")
    if (path.name == "__init__.py" or not path.name.startswith("_")) and path != ROOT
)
REEXPORTING = {Path("blocks.py"): {"AimlApiCredentials", "ImageBucket"}}
"""Names that a module passes on from another one on purpose."""


def _targets(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
        yield from (node.id for node in ast.walk(target or ast.Pass()) if isinstance(node, ast.Name))


def _read(module: Path) -> tuple[list[str] | None, set[str]]:
    """The names in `__all__`, or None without one, and the names that the module itself defines."""
    stated, defined = None, set()
    for statement in ast.parse((PACKAGE / module).read_text(encoding="utf-8")).body:
        names = set(_targets(statement))
        defined |= names
        if "__all__" in names and isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            stated = ast.literal_eval(statement.value)
    return stated, defined


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_public_module_has_all(module: Path) -> None:
    """`__all__` holds public names, each once."""
    stated, _ = _read(module)

    assert stated is not None
    assert len(stated) == len(set(stated))
    assert [name for name in stated if name.startswith("_")] == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_name_is_public_in_the_module_that_owns_it(module: Path) -> None:
    """A name is stated where it is defined; what a module passes on is listed here."""
    stated, defined = _read(module)

    assert set(stated or ()) - defined == REEXPORTING.get(module, set())
