"""`flux-prefect sandbox`: the same as `python -m flux_prefect.sandbox`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from flux_prefect.sandbox.__main__ import main

__all__ = ["sandbox"]


def sandbox(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Run the sandbox until Ctrl-C; its exit status."""
    return main(list(arguments), program="flux-prefect sandbox")
