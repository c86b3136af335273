"""Pages of the reference, made from the command lines, the configuration classes and the public names."""

import re
import typing
from collections.abc import Iterator
from typing import Any

import typer
from values import default_of, type_of, unit_of

import salt_distill
from salt_distill.common import config
from salt_distill.common.config import Config
from salt_distill.common.config.layers import is_nested
from salt_distill.common.data.making.cli import app as data
from salt_distill.common.plan.cli import app as plan
from salt_distill.student_trainer.cli import app as train
from salt_distill.student_trainer.evaluation.cli import app as evaluate
from salt_distill.teacher_server.cli import app as serve

PROGRAMS = {
    "salt-data": data,
    "salt-train": train,
    "salt-serve": serve,
    "salt-eval": evaluate,
    "salt-plan": plan,
}
_SHOWN_ELSEWHERE = {"help", "version", "install_completion", "show_completion"}


def reference_pages() -> dict[str, str]:
    """Markdown by path in the site."""
    pages = {f"reference/{name}.md": _program(name, app) for name, app in PROGRAMS.items()}
    return pages | {"reference/configuration.md": _configuration(), "reference/python.md": _python()}


def _program(name: str, app: typer.Typer) -> str:
    command = typer.main.get_command(app)
    return f"# {name}\n\n{_help(command)}\n\n" + "\n\n".join(_commands(name, command)) + "\n"


def _commands(name: str, command: Any) -> Iterator[str]:
    """A section for each command of a program, and of the groups in it."""
    if hasattr(command, "commands"):
        for child, below in command.commands.items():
            yield from _commands(f"{name} {child}", below)
        return
    parameters = [each for each in command.params if each.name not in _SHOWN_ELSEWHERE]
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    usage = " ".join([name, *((each.name or "").upper() for each in arguments), "[FLAGS]"])
    rows = ["| argument or flag | value | what it does |", "|---|---|---|"]
    for each in parameters:
        flag, value = _flag(each)
        rows.append(f"| `{flag}` | {value} | {_cell(_unescaped(getattr(each, 'help', None) or ''))} |")
    yield f"## {name}\n\n{_help(command)}\n\n```text\n{usage}\n```\n\n" + "\n".join(rows)


def _flag(parameter: Any) -> tuple[str, str]:
    """How a parameter is typed, and what values it takes."""
    if parameter.param_type_name == "argument":
        return (parameter.name or "").upper(), "text"
    flag = " / ".join([*parameter.opts, *parameter.secondary_opts])
    if getattr(parameter, "is_flag", False):
        return flag, ""
    words = {"TEXT": "text", "NUMBER": "number", "FILE": "file", "KEY=VALUE": "`KEY=VALUE`"}
    values = str(parameter.metavar or "TEXT").split("|")
    return flag, ", ".join(words.get(value, f"`{value}`") for value in values)


def _help(command: Any) -> str:
    return _unescaped(command.help or "").strip()


def _unescaped(text: str) -> str:
    """Without what keeps the terminal from reading brackets as colours."""
    return text.replace("\\[", "[")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _configuration() -> str:
    """Every configuration class with its values."""
    head = (
        "# Configuration\n\nEvery value of every command. A top-level value is a flag (`log_every` is"
        " `--log-every`); one inside a group is given by `--set GROUP.KEY=VALUE`; both stand in a `--config`"
        " file by their key. `--print-config` shows what a command line means. Groups are listed by the name"
        " of their class.\n\n"
    )
    return head + "\n\n".join(map(_class, _classes())) + "\n"


def _classes() -> list[type[Config]]:
    """Every configuration class, and those that their values are made of, by name."""
    left = [getattr(config, name) for name in config.__all__]
    found: dict[str, type[Config]] = {}
    while left:
        each = left.pop()
        left += typing.get_args(each)
        if isinstance(each, type) and issubclass(each, Config) and each.__name__ not in found:
            found[each.__name__] = each
            left += [field.annotation for field in each.model_fields.values()]
    del found[Config.__name__]
    return [found[name] for name in sorted(found)]


def _class(config_class: type[Config]) -> str:
    rows = ["| key | type | unit | default | what it is |", "|---|---|---|---|---|"]
    for name, field in config_class.model_fields.items():
        if is_nested(field.annotation):
            group = field.annotation.__name__  # type: ignore[union-attr]
            kind, unit, default = f"group [{group}](#{group.lower()})", "", ""
        else:
            kind, unit, default = type_of(field), unit_of(name, field.description or ""), default_of(field)
        cells = (f"`{name}`", kind, unit, default, field.description or "")
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    docstring = re.sub(r"``([^`]+)``", r"`\1`", config_class.__doc__ or "")
    return f"## {config_class.__name__}\n\n{' '.join(docstring.split())}\n\n" + "\n".join(rows)


def _python() -> str:
    """The public names, which mkdocstrings documents."""
    head = (
        "# Python\n\nThe public names of `salt_distill`; [examples](../python.md) show them at work. What is"
        " under them may move.\n\n"
    )
    modules = {name: salt_distill._ELSEWHERE.get(name, "salt_distill.api") for name in salt_distill.__all__}
    return head + "\n\n".join(f"::: {module}.{name}" for name, module in modules.items()) + "\n"
