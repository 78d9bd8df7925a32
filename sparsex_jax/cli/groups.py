"""Options in groups. A group is a frozen dataclass, and each of its fields is an option with its help.

A command that has a parameter of a group's type takes all of its options, and gets them as one value. So what several
commands take is declared once, and the value can make what its options configure.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of its groups in place of the groups, in the order of its parameters."""
    signature = inspect.signature(command, eval_str=True)
    given = signature.parameters.values()
    groups: dict[str, Any] = {each.name: each.annotation for each in given if dataclasses.is_dataclass(each.annotation)}

    @functools.wraps(command)
    def run(**typed: Any) -> None:
        made = {name: group(**{each: typed.pop(each) for each in _names(group)}) for name, group in groups.items()}
        command(**made, **typed)

    parameters = [option for each in given for option in _options(each)]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _options(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """The parameter itself, or those of the fields of its group."""
    group = parameter.annotation
    if not dataclasses.is_dataclass(group):
        yield parameter.replace(kind=parameter.KEYWORD_ONLY)
        return
    hints = typing.get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        yield parameter.replace(
            name=field.name, kind=parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )


def _names(group: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(group)]
