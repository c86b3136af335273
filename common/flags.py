"""A field of a configuration class as a flag or an argument of a command."""

import inspect
import typing
from typing import Any

import typer
from pydantic.fields import FieldInfo

from salt_distill.common.config.layers import flag_of
from salt_distill.common.config.wrong_values import members_of


def argument_or_flag(name: str, field: FieldInfo, *, positional: bool) -> inspect.Parameter:
    """The parameter of a command for one field; its docstring is the help."""
    kinds = {kind for kind, _ in members_of(field.annotation)}
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    note = (
        "required" if field.is_required() else "" if default in (None, ()) else f"default {_plain(default)}"
    )
    help = f"{field.description or ''}" + (f" \\[{note}]" if note else "")
    has_tuple = any(typing.get_origin(kind) is tuple for kind in kinds)
    many = has_tuple and int not in kinds
    if positional:
        annotation = list[str] | None if many else str | None
        return parameter(
            name, annotation, typer.Argument(metavar=name.upper(), help=help, show_default=False)
        )
    flag = flag_of(name)
    if bool in kinds:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=help, show_default=False)
        return parameter(name, bool | None, option)
    choices = [str(choice) for kind in kinds for choice in _choices(kind)]
    others = "NUMBER" if kinds & {int, float} else "" if choices else "TEXT"
    if has_tuple and not many:  # one text: 224, or 64x96
        others = "NUMBER|NUMBERxNUMBER"
    metavar = "|".join(filter(None, [*choices, others]))
    option = typer.Option(
        flag,
        metavar=metavar,
        help=help + (" Repeatable." if many else ""),
        show_default=False,
        autocompletion=(lambda: choices) if choices else None,
    )
    return parameter(name, list[str] | None if many else str | None, option)


def parameter(name: str, annotation: Any, option: Any, default: Any = None) -> inspect.Parameter:
    """A parameter of a command, as Typer reads it from a function."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=typing.Annotated[annotation, option], default=default
    )


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_plain, value)) if isinstance(value, tuple) else str(value)
