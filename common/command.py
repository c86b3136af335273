"""Commands made from configuration classes: the top-level fields of a class are its flags, ``--set`` reaches
the rest."""

import difflib
import inspect
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pydantic
import rich.console
import rich.markup
import typer
import yaml
from pydantic.fields import FieldInfo

from salt_distill.common.config import (
    MASKS,
    PRESETS,
    Config,
    dump_yaml,
    explain,
    load_yaml,
    mask_layer,
    merge,
    preset_layer,
    warmup_layer,
)

C = TypeVar("C", bound=Config)

console = rich.console.Console(stderr=True)


def new_app(help: str) -> typer.Typer:
    """A command group; ``run_app`` is its entry point."""
    app = typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    app.callback()(lambda: None)  # so that a group with one command still has its name
    return app


def command_app(config_class: type[C], run: Callable[[C], None], *, help: str) -> typer.Typer:
    """A command that is no group: the program itself takes the flags of ``config_class``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    add_command(
        app, "command", config_class, run, help=help
    )  # a typer with one command and no callback has no use for its name
    return app


def run_app(app: typer.Typer) -> None:
    """Runs a command line: what the user got wrong is one sentence and exit code 1 or 2, never a
    traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except (ValueError, OSError, yaml.YAMLError) as error:
        if os.environ.get("SALT_DEBUG"):
            raise
        if isinstance(error, pydantic.ValidationError):
            _stop(explain(error), exit_code=2)
        _stop(_sentence(error), exit_code=1)


def _sentence(error: Exception) -> str:
    """What went wrong, for people: the system's own errors begin with a number, YAML's have many lines."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}: choose another path, or make room or give access there"
    return " ".join(f"{error}".split()) if isinstance(error, yaml.YAMLError) else f"{error}"


def _stop(sentence: str, exit_code: int) -> typing.NoReturn:
    console.print(f"[bold red]error:[/] {rich.markup.escape(sentence)}", highlight=False, soft_wrap=True)
    sys.exit(exit_code)


def add_command(
    app: typer.Typer,
    name: str,
    config_class: type[C],
    run: Callable[[C], None],
    *,
    help: str,
    default_preset: str | None = None,
    presets: Mapping[str, dict[str, Any]] = {},
    positional: tuple[str, ...] = (),
) -> None:
    """Adds ``name`` to ``app``: resolves preset < mask < ``--config`` file < flags < ``--set`` to a
    ``config_class`` and runs it.

    Every top-level field that is no nested configuration becomes a flag, with its docstring as help; so a
    flag that changes nothing cannot exist. The fields in ``positional`` are arguments instead.
    ``--print-config`` prints the resolved configuration instead of running. ``presets``: what ``--preset``
    chooses from; PRESETS where only ``default_preset`` is given, and no such flag where neither is.
    """
    if default_preset is not None and not presets:
        presets = PRESETS

    def command(**values: Any) -> None:
        config = resolve(config_class, default_preset=default_preset, presets=presets, **values)
        if values["print_config"]:
            print(dump_yaml(config), end="")
        else:
            run(config)

    parameters = [
        _flag(field_name, field, positional=field_name in positional)
        for field_name, field in config_class.model_fields.items()
        if not is_nested(field.annotation)
    ]
    if presets:
        what = "Sizes and schedules" if presets is PRESETS else "Protocols"
        option = typer.Option(
            help=f"{what}: {', '.join(presets)}.",
            rich_help_panel="Configuration",
            show_default=default_preset is not None,
        )
        parameters.append(_parameter("preset", str | None, option, default_preset))
    if "mask" in config_class.model_fields:
        masks = typer.Option(
            help=f"Masking strategy: {', '.join(MASKS)}.", rich_help_panel="Configuration", show_default=False
        )
        parameters.append(_parameter("mask", str | None, masks, None))
    file = typer.Option(
        metavar="FILE", help="YAML file of configuration keys.", rich_help_panel="Configuration"
    )
    parameters.append(_parameter("config", str | None, file, None))
    settings = typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any key, for example optim.lr=1e-3. Repeatable.",
        rich_help_panel="Configuration",
    )
    parameters.append(_parameter("settings", list[str] | None, settings, None))
    printing = typer.Option(
        "--print-config", help="Print the resolved configuration and exit.", rich_help_panel="Configuration"
    )
    parameters.append(_parameter("print_config", bool, printing, False))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=help)(command)


def resolve(
    config_class: type[C],
    *,
    default_preset: str | None = None,
    presets: Mapping[str, dict[str, Any]] = {},
    preset: str | None = None,
    mask: str | None = None,
    config: str | None = None,
    settings: list[str] | None = None,
    print_config: bool = False,
    **flags: Any,
) -> C:
    """The configuration that a command line means. Raises pydantic.ValidationError or ValueError with the key
    that is wrong."""
    chosen = preset or default_preset
    preset_values = {} if chosen is None else preset_layer(config_class, chosen, presets)
    layers = []
    if mask is not None:
        layers.append(mask_layer(mask))
    if config is not None:
        layers.append(load_yaml(config))
    layers.append({name: value for name, value in flags.items() if value is not None and value != []})
    layers += [_setting(config_class, text) for text in settings or []]
    typed = merge(*layers)
    shorter_warmup, sentence = warmup_layer(config_class, preset_values, typed)
    if sentence is not None:
        console.print(sentence, highlight=False, soft_wrap=True)
    return config_class.model_validate(merge(preset_values, typed, shorter_warmup))


def is_nested(annotation: Any) -> bool:
    """Whether a field holds a configuration of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _setting(config_class: type[Config], text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set: got {text!r}, expected KEY=VALUE, for example optim.lr=1e-3")
    known = list(_keys(config_class))
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        raise ValueError(
            f"--set: got the unknown key {key!r}"
            + (f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(known)}")
        )
    read: Any = yaml.safe_load(value)
    # Of a single value the field decides what the text means: 1e-3 is a number, which YAML takes for text,
    # and a name may be 7.
    nested: Any = read if isinstance(read, dict | list | None) else value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _keys(config_class: type[Config]) -> typing.Iterator[str]:
    for name, field in config_class.model_fields.items():
        annotation = field.annotation
        if is_nested(annotation):
            yield from (f"{name}.{key}" for key in _keys(typing.cast(type[Config], annotation)))
        else:
            yield name


def _flag(name: str, field: FieldInfo, *, positional: bool) -> inspect.Parameter:
    kinds = set(_members(field.annotation))
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    shown = "required" if field.is_required() else None if default in (None, ()) else f"default {default}"
    help = f"{field.description or ''}" + (f" \\[{shown}]" if shown else "")
    many = any(typing.get_origin(kind) is tuple for kind in kinds)
    if positional:
        annotation = list[str] | None if many else str | None
        return _parameter(
            name, annotation, typer.Argument(metavar=name.upper(), help=help, show_default=False), None
        )
    spelled = name.rstrip("_").replace("_", "-")  # json_: pydantic has a `json` of its own
    flag = f"--{spelled}"
    if bool in kinds:
        return _parameter(
            name, bool | None, typer.Option(f"{flag}/--no-{spelled}", help=help, show_default=False), None
        )
    if many:
        return _parameter(
            name, list[str] | None, typer.Option(flag, help=help + " Repeatable.", show_default=False), None
        )
    metavar = "NUMBER" if kinds & {int, float} else "TEXT"
    return _parameter(
        name, str | None, typer.Option(flag, metavar=metavar, help=help, show_default=False), None
    )


def _members(annotation: Any) -> typing.Iterator[Any]:
    """The alternatives of a type, without Annotated and unions around them."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _parameter(name: str, annotation: Any, option: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=typing.Annotated[annotation, option], default=default
    )
