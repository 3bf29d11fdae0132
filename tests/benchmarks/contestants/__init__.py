"""Who competes: each a module with one `compete`, imported only in the process that is measured."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Literal, TypeAlias

from .contender import Contender

Name: TypeAlias = Literal["lean", "plain", "empty", "steps", "chunks", "auto"]


def open_contestant(name: Name, in_flight: int, prefix: str) -> AbstractAsyncContextManager[Contender]:
    """The contestant of that name with everything imported and its clients made.

    Only its own modules are imported: whatever else is loaded would count as its memory.
    """
    if name == "lean":
        from . import lean  # noqa: PLC0415 - see above

        return lean.compete(in_flight, prefix)
    if name == "plain":
        from . import plain  # noqa: PLC0415 - see above

        return plain.compete(in_flight, prefix)
    if name == "empty":
        from . import empty  # noqa: PLC0415 - see above

        return empty.compete(in_flight)
    from . import ours  # noqa: PLC0415 - see above

    return ours.compete(in_flight, prefix, name)
