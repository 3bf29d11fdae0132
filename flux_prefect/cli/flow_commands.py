"""Commands made of flows: a flow's parameters are the command's options, and their descriptions its help."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_type_hints

from cyclopts import Group
from prefect import Flow
from prefect.client.schemas.objects import State
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console, RenderableType

from flux_prefect.cli.exit_status import FAILED, MISUSED
from flux_prefect.cli.options import choices_of, make_command, make_option, plain_kind, show_as
from flux_prefect.cli.temporary_server import NoServer, temporary_server
from flux_prefect.cli.terminal import refuse_bad_settings, run_to_state
from flux_prefect.errors import FluxError
from flux_prefect.tables.table import explain_invalid

__all__ = ["Extra", "FlowCommand", "Given", "Special", "one_line"]

Given: TypeAlias = dict[str, Any]
"""The values of a command line, by the names of its options."""


@dataclass(frozen=True)
class Extra:
    """An option of a command that is no parameter of its flow.

    Attributes:
        kind: the value's type.
        default: the value where the option is not given.
        help: the option's help.
    """

    kind: Any
    default: Any
    help: str


@dataclass(frozen=True)
class Special:
    """A parameter that is written in another way on a command line than in a form.

    Attributes:
        kind: the type of what is written.
        default: what is shown and read where the option is not given.
        read: makes the parameter's value of it. A ValueError says what is wrong.
    """

    kind: Any
    default: Any
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class FlowCommand:
    """A command that runs a flow in this process and prints what it ended with.

    Attributes:
        flow: the flow.
        first: the parameter that is given by its place on the command line, without a name.
        show: yields what is printed of a report: tables and lines.
        to_json: makes the JSON object of a report.
        models: parameters whose fields are options of their own, each with its model.
        special: parameters that are written in another way than in a form.
        extras: further options.
        prepare: gets the values as they were written, and returns those to be used.
    """

    flow: Flow[..., Any]
    first: str
    show: Callable[[State[Any], Any, Given], Iterable[RenderableType]]
    to_json: Callable[[Any], Any]
    models: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    special: Mapping[str, Special] = field(default_factory=dict)
    extras: Mapping[str, Extra] = field(default_factory=dict)
    prepare: Callable[[Given], Given] = dict

    def build(self) -> Callable[..., int]:
        """The function that cyclopts makes a command of; it returns the exit status."""
        return make_command(self._run, self._options())

    def _options(self) -> Iterable[inspect.Parameter]:
        texts = self.flow.parameters.properties
        hints = get_type_hints(self.flow.fn, include_extras=True)
        for name, parameter in inspect.signature(self.flow.fn).parameters.items():
            text = texts[name].get("description", "")
            if name in self.models:
                yield from self._options_of(self.models[name], Group(name.capitalize(), help=text, sort_key=1))
            elif name in self.special:
                yield self._make(name, self.special[name].kind, self.special[name].default, help=text)
            else:
                yield self._make(name, plain_kind(hints[name]), parameter.default, help=text)
        for name, extra in self.extras.items():
            yield self._make(name, extra.kind, extra.default, help=extra.help)
        yield self._make("json", bool, default=False, help="Print the report as one JSON object, all else on stderr.")

    def _options_of(self, model: type[BaseModel], group: Group) -> Iterable[inspect.Parameter]:
        """An option for each field. They are read as text, so that the model's own messages show what was written."""
        for name, info in model.model_fields.items():
            choices = choices_of(info.annotation) or str
            usual = info.get_default()
            if info.is_required():
                yield self._make(name, choices, help=info.description or "")
            else:
                text = info.description or ""
                yield self._make(name, choices | None, None, help=text, group=group, show_default=show_as(usual))

    def _make(self, name: str, kind: Any, default: Any = inspect.Parameter.empty, **described: Any) -> Any:
        return make_option(name, kind, default, is_first=name == self.first, **described)

    def _run(self, given: Given) -> int:
        if not given["json"]:
            return self._run_flow(given, lambda _: None)
        reports: list[Any] = []
        with redirect_stdout(sys.stderr):
            status = self._run_flow(given, reports.append)
        for report in reports:
            print(json.dumps(self.to_json(report), indent=2, ensure_ascii=False))
        return status

    def _run_flow(self, given: Given, take: Callable[[Any], None]) -> int:
        try:
            parameters = self._parameters(self.prepare(given))
            refuse_bad_settings()
            with temporary_server():
                state = run_to_state(lambda: self.flow(**parameters, return_state=True))
        except (_BadArgument, NoServer) as error:
            print(error, file=sys.stderr)
            return MISUSED
        result = state.result(raise_on_failure=False)
        report = getattr(result, "report", None) if isinstance(result, FluxError) else result
        if report is not None and not isinstance(report, BaseException):
            take(report)
            for shown in self.show(state, report, given):
                _print(shown, given)
        if not state.is_completed():
            print(f"{state.name}: {state.message}", file=sys.stderr)
            return FAILED
        return 0

    def _parameters(self, given: Given) -> dict[str, Any]:
        """The flow's parameters.

        Raises:
            _BadArgument: a value that the flow's form would not take.
        """
        hints = get_type_hints(self.flow.fn, include_extras=True)
        parameters = {}
        for name in inspect.signature(self.flow.fn).parameters:
            try:
                if name in self.models:
                    fields = {each: given[each] for each in self.models[name].model_fields if given[each] is not None}
                    parameters[name] = self.models[name].model_validate(fields)
                    continue
                value = self.special[name].read(given[name]) if name in self.special else given[name]
                parameters[name] = TypeAdapter[Any](hints[name]).validate_python(value)
            except ValidationError as error:
                if name in self.models:
                    raise _BadArgument(explain_invalid(error)) from error
                raise _BadArgument(f"{self._written(name)} is {given[name]!r}: {error.errors()[0]['msg']}") from error
            except ValueError as error:
                raise _BadArgument(f"{self._written(name)}: {error}") from error
        return parameters

    def _written(self, name: str) -> str:
        return name.upper() if name == self.first else f"--{name.replace('_', '-')}"


class _BadArgument(Exception):
    """A value on the command line that can't be used; the message names its option."""


def one_line(state: State[Any]) -> str:
    """How a run ended, in one line."""
    return f"{state.name}: {state.message}"


def _print(shown: RenderableType, given: Given) -> None:
    if isinstance(shown, str):
        print(shown)
    elif not given["json"]:
        Console().print(shown)
