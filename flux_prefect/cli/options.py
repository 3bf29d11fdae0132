"""Options of commands that are made of what is described elsewhere: flows' parameters and models' fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from datetime import date
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import Parameter

__all__ = ["choices_of", "make_command", "make_option", "plain_kind", "reflow", "show_as"]

_SIMPLE = {str, int, float, bool, date}


def make_option(
    name: str, kind: Any, default: Any = inspect.Parameter.empty, *, is_first: bool = False, **described: Any
) -> inspect.Parameter:
    """An option of a command; the first is given by its place. What describes it is as cyclopts' Parameter has it."""
    if "show_default" not in described and default is not inspect.Parameter.empty:
        described["show_default"] = show_as(default)
    described["help"] = reflow(described.get("help", ""))
    annotation = Annotated[kind, Parameter(negative=(), consume_multiple=True, **described)]
    place = inspect.Parameter.POSITIONAL_ONLY if is_first else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, place, default=default, annotation=annotation)


def make_command(run: Callable[[dict[str, Any]], int], options: Iterable[inspect.Parameter]) -> Callable[..., int]:
    """The function that cyclopts makes a command of: it has these options and passes their values on by name."""
    ordered = sorted(options, key=lambda option: (option.kind, option.default is not option.empty))
    signature = inspect.Signature(ordered)

    def command(*args: Any, **kwargs: Any) -> int:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return run(bound.arguments)

    command.__signature__ = signature  # type: ignore[attr-defined]  # how functions are described
    command.__annotations__ = {option.name: option.annotation for option in ordered}
    return command


def reflow(text: str) -> str:
    """Text without the line breaks of its source. Paragraphs stay apart."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def show_as(default: Any) -> Callable[[Any], str] | bool:
    """What the help shows as the default; nothing for what is empty or off."""
    if default is None or default is False or default == []:
        return False
    text = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
    return lambda _: text


def choices_of(hint: Any) -> Any:
    """The Literal of a type that is one, or one with None; None for any other type."""
    options = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
    kinds = [option for option in options if option is not NoneType]
    return kinds[0] if len(kinds) == 1 and get_origin(kinds[0]) is Literal else None


def plain_kind(hint: Any) -> Any:
    """The type of an option for a form's type: of blocks, lists of rows and text it is text."""
    if get_origin(hint) is Annotated:
        return plain_kind(get_args(hint)[0])
    if get_origin(hint) in {Union, UnionType}:
        kinds = [plain_kind(kind) for kind in get_args(hint)]
        plain = next(kind for kind in kinds if kind in _SIMPLE or get_origin(kind) is Literal)
        return plain | None if NoneType in kinds else plain
    if get_origin(hint) is list:
        return list[plain_kind(get_args(hint)[0])]  # type: ignore[misc]  # a type that is made here
    return hint
