"""Commands made from configuration classes: the top-level fields of a class are its flags, ``--set`` reaches
the rest. Our own on top of typer, which makes flags of a function's parameters and knows no presets, files
and ``--set`` that win over each other in this order."""

import importlib
import inspect
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import typer
import yaml

from salt_distill.common.config import (
    MASKS,
    PRESETS,
    Config,
    ConfigValues,
    dump_yaml,
    mask_layer,
    preset_layer,
    unscaled_rate,
    warmup_layer,
)
from salt_distill.common.config.layers import (
    Layer,
    explain,
    flag_of,
    is_nested,
    keys_of,
    merge,
    read_layer,
    suggestion,
)
from salt_distill.common.console import console
from salt_distill.common.extras import missing_module, require_extra
from salt_distill.common.flags import argument_or_flag, parameter
from salt_distill.common.termination import ended_by_signals
from salt_distill.common.whole import require_place

C = TypeVar("C", bound=Config)


class UsageError(ValueError):
    """A command line that means nothing; exit code 2."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"salt-distill {version('salt-distill')}")
        raise typer.Exit


_VERSION: Any = typer.Option(
    "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
)


def new_app(help: str) -> typer.Typer:
    """A command group; ``run_app`` is its entry point."""
    app = typer.Typer(
        help=help, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )

    def group(version: typing.Annotated[bool, _VERSION] = False) -> None:
        pass

    app.callback()(group)  # a group with one command still has its name
    return app


def command_app(config_class: type[Config], run: str, *, help: str) -> typer.Typer:
    """A command that is no group: the program itself takes the flags of ``config_class``; see
    ``add_command``."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
    # Typer has no use for the name of the one command of an app without a callback.
    add_command(app, "command", config_class, run, help=help, with_version=True)
    return app


def run_app(app: typer.Typer) -> None:
    """Runs a command line: what the user got wrong is one sentence and exit code 1 or 2, never a
    traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except UsageError as error:
        _stop(str(error), exit_code=2)
    except pydantic.ValidationError as error:
        _stop(explain(error), exit_code=2)
    except yaml.YAMLError as error:  # its own have many lines
        _stop(" ".join(str(error).split()), exit_code=1, error=error)
    except ModuleNotFoundError as error:
        if (sentence := missing_module(error.name or "")) is None:
            raise
        _stop(sentence, exit_code=1, error=error)
    except (ValueError, OSError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:  # without its number
            sentence = f"{error.filename}: {error.strerror}"
        _stop(sentence, exit_code=1, error=error)


def add_command(
    app: typer.Typer,
    name: str,
    config_class: type[Config],
    run: str,
    *,
    help: str,
    default_preset: str | None = None,
    presets: Mapping[str, ConfigValues] = {},
    positional: tuple[str, ...] = (),
    with_version: bool = False,
) -> None:
    """Adds ``name`` to ``app``: resolves preset < mask < ``--config`` file < flags < ``--set`` to a
    ``config_class`` and runs it.

    ``run``: the function that takes it, such as ``salt_distill.common.data.making.pack:pack``; its module is
    imported when the command runs, so that help and wrong flags answer at once. Every top-level field that
    is no nested configuration becomes a flag, with its docstring as help; so a flag that changes nothing
    cannot exist. The fields in ``positional`` are arguments instead. ``--print-config`` prints the resolved
    configuration instead of running. ``presets``: what ``--preset`` chooses from; PRESETS where only
    ``default_preset`` is given, and no such flag where neither is.
    """
    if default_preset is not None and not presets:
        presets = PRESETS

    def command(**values: Any) -> None:
        values.pop("version", None)
        printing = values.pop("print_config")
        config = resolve(
            config_class,
            default_preset=default_preset,
            presets=presets,
            positional=positional,
            fill=printing,
            **values,
        )
        if printing:
            print(dump_yaml(config), end="")
            return
        for extra in config.extras:
            require_extra(extra)
        _require_places(config, positional)
        function = load(run)  # until here a signal may end the process at once, as ``programs`` has it
        with ended_by_signals():
            function(config)

    parameters = _parameters(config_class, default_preset, presets, positional, with_version)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(name, help=help)(command)


def _require_places(config: Config, positional: tuple[str, ...]) -> None:
    """Raises ValueError where a path of this machine is an address, or nothing can be written at ``out``."""
    values = dict(config)
    for name in config.places:
        value = values.get(name)
        if isinstance(value, str) and "://" in value:
            flag = name.upper() if name in positional else flag_of(name)
            copies = ": give a folder, and the address as --storage" if "storage" in values else ""
            raise UsageError(f"got {flag} {value}, an address, expected a path of this machine{copies}")
    if (out := values.get("out")) is not None and "://" not in out:
        require_place(Path(out))


def _parameters(
    config_class: type[Config],
    default_preset: str | None,
    presets: Mapping[str, ConfigValues],
    positional: tuple[str, ...],
    with_version: bool,
) -> list[inspect.Parameter]:
    """Those of a command: of the fields of its configuration, and of where values come from."""
    parameters = [
        argument_or_flag(field_name, field, positional=field_name in positional)
        for field_name, field in config_class.model_fields.items()
        if not is_nested(field.annotation)
    ]
    if presets:
        what = "Sizes and schedules" if presets is PRESETS else "Protocols"
        default = f" \\[default {default_preset}]" if default_preset else ""
        option = _of_configuration(f"{what}: {', '.join(presets)}.{default}", choices=presets)
        parameters.append(parameter("preset", str | None, option))
    if "mask" in config_class.model_fields:
        option = _of_configuration(f"Masking strategy: {', '.join(MASKS)}.", choices=MASKS)
        parameters.append(parameter("mask", str | None, option))
    file = _of_configuration("YAML file of keys, nested or dotted; `preset` too.", "--config", "FILE")
    parameters.append(parameter("config", str | None, file))
    settings = _of_configuration("Any key, for example optim.lr=1e-3. Repeatable.", "--set", "KEY=VALUE")
    parameters.append(parameter("settings", list[str] | None, settings))
    printing = _of_configuration("Print the resolved configuration and exit.", "--print-config")
    parameters.append(parameter("print_config", bool, printing, False))
    if with_version:
        parameters.append(parameter("version", bool, _VERSION, False))
    return parameters


def load(name: str) -> Callable[[Any], None]:
    """The function of a ``module:function``."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def resolve(
    config_class: type[C],
    *,
    default_preset: str | None = None,
    presets: Mapping[str, ConfigValues] = {},
    positional: tuple[str, ...] = (),
    fill: bool = False,
    preset: str | None = None,
    mask: str | None = None,
    config: str | None = None,
    settings: list[str] | None = None,
    **flags: Any,
) -> C:
    """The configuration that a command line means; ``fill``: with the name of a text that is required and not
    given. Raises UsageError that names the file, the line, the key and the flag of what is wrong."""
    file = None if config is None else read_layer(config)
    layers: list[Layer] = []
    if file is not None:
        if presets:
            in_file = file.values.pop("preset", None)
            preset = preset or in_file
        if isinstance(strategy := file.values.get("mask"), str):
            file.values["mask"] = mask_layer(strategy)["mask"]
    preset_values: ConfigValues = {}
    if preset := preset or default_preset:
        preset_values = preset_layer(config_class, preset, presets)
        layers.append(_layer(preset_values, f"--preset {preset}"))
    num_preset_layers = len(layers)
    if mask is not None:
        layers.append(_layer(mask_layer(mask), f"--mask {mask}"))
    if file is not None:
        layers.append(file)

    def flag_or_argument(key: str) -> str:
        name, _, below = re.sub(r"\.\d+", "", key).partition(".")
        return (name.upper() if name in positional else flag_of(name)) + (f": {below}" if below else "")

    given = {name: value for name, value in flags.items() if value is not None and value != []}
    layers.append(Layer(given, flag_or_argument))
    layers += [_setting(config_class, text) for text in settings or []]
    typed = merge(*(layer.values for layer in layers[num_preset_layers:]))
    layers += _shorter_warmup(config_class, preset_values, typed)
    values = merge(*(layer.values for layer in layers))
    try:
        if fill:
            values = _placeholders(config_class, values) | values
        resolved = config_class.model_validate(values)
    except pydantic.ValidationError as error:
        raise UsageError(explain(error, layers, config_class, unset=flag_or_argument)) from error
    _say(unscaled_rate(resolved, preset_values, typed))
    return resolved


def _stop(sentence: str, exit_code: int, error: Exception | None = None) -> typing.NoReturn:
    if error is not None and os.environ.get("SALT_DEBUG"):
        raise error
    console.print("error: ", style="bold red", end="")
    console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    sys.exit(exit_code)


def _of_configuration(
    help: str,
    flag: str | None = None,
    metavar: str | None = None,
    choices: Iterable[str] = (),
) -> Any:
    return typer.Option(
        *([flag] if flag else []),
        metavar=metavar,
        help=help,
        rich_help_panel="Configuration",
        show_default=False,
        autocompletion=(lambda: list(choices)) if choices else None,
    )


def _layer(values: ConfigValues, origin: str) -> Layer:
    return Layer(values, lambda key: f"{origin}: {key}")


def _shorter_warmup(config_class: type[Config], preset: ConfigValues, typed: ConfigValues) -> list[Layer]:
    """A warm-up that fits the run, where that of the preset does not and nobody typed one; it is said."""
    values, sentence = warmup_layer(config_class, preset, typed)
    _say(sentence)
    return [_layer(values, "--steps")] if values else []


def _say(sentence: str | None) -> None:
    if sentence is not None:
        console.print(sentence, highlight=False, soft_wrap=True)


def _placeholders(config_class: type[Config], values: ConfigValues) -> dict[str, str]:
    return {
        name: name.upper()
        for name, field in config_class.model_fields.items()
        if field.is_required() and field.annotation is str and name not in values
    }


def _setting(config_class: type[Config], text: str) -> Layer:
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"--set: got {text!r}, expected KEY=VALUE, for example optim.lr=1e-3")
    known = list(keys_of(config_class))
    if key not in known:
        raise UsageError(f"--set: got the unknown key {key!r}{suggestion(key, known)}")
    read: Any = yaml.safe_load(value)
    # Of a single value the field decides what the text means: 1e-3 is a number, which YAML takes for text,
    # and a name may be 7.
    nested: Any = read if isinstance(read, dict | list | None) else value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return Layer(nested, lambda wrong: f"--set {key}" + (f": {wrong}" if wrong != key else ""))
