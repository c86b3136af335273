"""A configuration from layers (preset, file, flags), and errors that name where a wrong value was given."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo

from salt_distill.common.config.base import Config, ConfigValues, parse_yaml
from salt_distill.common.config.wrong_values import (
    MISSING,
    configs_in,
    described,
    expected,
    says_what_it_got,
    shown,
)
from salt_distill.common.text_files import read_text

C = TypeVar("C", bound=Config)
_MEMBER = re.compile(r"[A-Z]\w*|int|str|float|bool|.*[\[-].*")
"""What pydantic calls a class, a plain type, ``literal['fresh']`` and ``function-after[...]``."""
_MOST_KEYS = 20
"""Keys that a sentence lists."""
_ALL_KEYS = "expected one of those that `--print-config` shows"
Place = Callable[[str], str]
"""Of a dotted key, where it was given."""


@dataclass(frozen=True)
class Layer:
    """Values of one place, nested as the configuration is."""

    values: ConfigValues
    place: Place
    """What an error calls a key of it, such as ``run.yaml, line 3: optim.lr``."""
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Line of each key, where the place is a file."""
    has_flags: bool = False
    """Whether its keys can be given on the command line too, which an error then says."""


def read_layer(path: str | Path) -> Layer:
    """The keys of a file of `--config`, nested or dotted. Raises ValueError with the line where it is no
    YAML."""
    layer = _read(path)
    return replace(layer, values=nested(layer.values), has_flags=True)


def read_config(config_class: type[C], path: str | Path) -> tuple[C, Layer]:
    """The configuration that a file is all of, such as a sweep's, and the file's keys as they stand there.
    Raises ValueError that names the line and the key of what is wrong."""
    layer = _read(path)
    try:
        return config_class.model_validate(layer.values), layer
    except pydantic.ValidationError as error:
        raise ValueError(explain(error, [layer], config_class, lambda key: f"{path}: {key}")) from error


def _read(path: str | Path) -> Layer:
    text = read_text(path)
    try:
        loaded, root = parse_yaml(text), yaml.compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path}{line}: got no YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: got {type(loaded).__name__}, expected a mapping of configuration keys")
    lines = dict(_lines(root))

    def place(key: str) -> str:
        below = [line for name, line in lines.items() if name.startswith(f"{key}.")]
        if key not in lines and below:  # the group of a dotted key
            return f"{path}, line {below[0]}"
        while key not in lines and "." in key:
            key = key.rpartition(".")[0]
        return f"{path}, line {lines[key]}" if key in lines else str(path)

    return Layer(loaded, lambda key: f"{place(key)}: {key}", lines)


def nested(values: ConfigValues) -> ConfigValues:
    """The same with dotted keys taken apart: ``optim.lr: 1`` is ``optim: {lr: 1}``."""
    layers = []
    for key, value in values.items():
        layer: Any = nested(value) if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            layer = {part: layer}
        layers.append(layer)
    return merge(*layers)


def merge(*layers: ConfigValues) -> ConfigValues:
    """Nested dictionaries in one; later layers win."""
    merged: ConfigValues = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = (
                merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
            )
    return merged


def keys_of(config_class: type[Config]) -> Iterator[str]:
    """Every dotted key of a configuration class."""
    for name, field in config_class.model_fields.items():
        if is_nested(field.annotation):
            yield from (f"{name}.{key}" for key in keys_of(typing.cast(type[Config], field.annotation)))
        else:
            yield name


def is_nested(annotation: Any) -> bool:
    """Whether a field holds a configuration of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Config)


def flag_of(key: str) -> str:
    """What gives a key on the command line."""
    key = re.sub(r"\.\d.*", "", key)  # of a list: all of it
    return f"--set {key}=..." if "." in key else f"--{key.rstrip('_').replace('_', '-')}"


def choice(what: str, got: object, choices: Iterable[str]) -> str:
    """Of a name that is none of the choices."""
    known = list(choices)
    close = difflib.get_close_matches(str(got).lower(), known, n=1)
    hint = f": did you mean {close[0]}?" if close else ""
    return f"got {what} {shown(got)}, expected one of {', '.join(known)}{hint}"


def suggestion(key: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown key."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    if not close:  # a nested key that was given without its group
        close = [name for name in known if name.rpartition(".")[2] == key][:1]
    if close:
        return f", did you mean {close[0]!r}?"
    return f", expected one of {', '.join(known)}" if len(known) <= _MOST_KEYS else f", {_ALL_KEYS}"


def explain(
    error: pydantic.ValidationError,
    layers: Sequence[Layer] = (),
    config_class: type[Config] | None = None,
    unset: Place = str,
) -> str:
    """One line per wrong value: where it was given, what was got, what was expected. ``unset``: the name of a
    key that no layer gives."""
    values = merge(*(layer.values for layer in layers)) if layers else None
    lines: dict[tuple[str, str, str], list[str]] = {}
    errors = [(_key(item["loc"], values), item) for item in _of_the_nearest(error.errors())]
    for below, item in errors:
        if item["type"] == "too_short" and any(key.startswith(f"{below}.") for key, _ in errors):
            continue  # it misses what is wrong
        key, got, sentence = _got_and_expected(below, item, values, config_class)
        layer = _layer_of(key, layers)
        place = "" if not key else unset(key) if layer is None else layer.place(key)
        from_file = key and layer is not None and layer.has_flags and item["type"] != "extra_forbidden"
        flag = f" (as a flag: {flag_of(key)})" if from_file else ""
        sentences = lines.setdefault((place, got, flag), [])
        if sentence not in sentences:
            sentences.append(sentence)
    return "\n".join(
        f"{place}{' ' if sentences == [MISSING] else ': ' if place else ''}{got}"
        f"{' or '.join(sentences).replace(' or expected', ' or')}{flag}"
        for (place, got, flag), sentences in lines.items()
    )


def _got_and_expected(
    key: str, item: Any, values: Any, config_class: type[Config] | None
) -> tuple[str, str, str]:
    """What one error says, and of which key: of a pair of numbers always the whole pair."""
    if item["type"] == "extra_forbidden":
        return (
            key,
            "",
            expected(item) + ("" if config_class is None else _unknown(key, item["input"], config_class)),
        )
    name, declared = ("", None) if config_class is None else _declared(key, config_class)
    is_own = says_what_it_got(item) and name == key
    words = None if declared is None or is_own else described(declared, is_part=name != key)
    if words is not None:
        value = item["input"] if name == key else _at(name, values)
        return name, f"got {shown(value)}, ", words
    return key, "" if says_what_it_got(item) else f"got {shown(item['input'])}, ", expected(item)


def _of_the_nearest(errors: Sequence[Any]) -> list[Any]:
    """The errors without those of other configurations than the one that a value is nearest to, where it may
    be one of several, as a mask set may."""
    by_member: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for item in errors:
        for depth, part in enumerate(item["loc"]):
            if str(part).endswith("Config"):
                by_member.setdefault(item["loc"][:depth], {}).setdefault(part, []).append(item)
    left_out = [
        item
        for members in by_member.values()
        for errors_of_member in sorted(members.values(), key=_distance)[1:]
        for item in errors_of_member
    ]
    return [item for item in errors if item not in left_out]


def _distance(errors: list[Any]) -> tuple[int, int]:
    return sum(item["type"] == "extra_forbidden" for item in errors), len(errors)


def _declared(key: str, config_class: type[Config]) -> tuple[str, FieldInfo | None]:
    """The field that a key is, or is a part of, and that field's own key."""
    name, _, below = key.partition(".")
    found = config_class.model_fields.get(name)
    if found is None or not (below and is_nested(found.annotation)):
        return name, found
    inner, found = _declared(below, typing.cast(type[Config], found.annotation))
    return f"{name}.{inner}", found


def _unknown(key: str, value: Any, config_class: type[Config]) -> str:
    """The end of a sentence about an unknown key: what may stand there."""
    name, declared = _declared(key, config_class)
    if declared is None or name == key:
        keys = list(keys_of(config_class))
        groups = dict.fromkeys(name.rpartition(".")[0] for name in keys if "." in name)
        return suggestion(key, [*groups, *keys] if isinstance(value, dict) else keys)
    names = [below for kind in configs_in(declared.annotation) for below in kind.model_fields]
    return suggestion(key.rpartition(".")[2], dict.fromkeys(names))


def _layer_of(key: str, layers: Sequence[Layer]) -> Layer | None:
    """The layer that gives a key, or the nearest one above it."""
    while key:
        for layer in reversed(layers):
            if _at(key, layer.values) is not None:
                return layer
        key = key.rpartition(".")[0]
    return None


def _at(key: str, values: Any) -> Any:
    for part in key.split("."):
        values = _below(values, int(part) if part.isdecimal() else part)
    return values


def _below(values: Any, part: str | int) -> Any:
    if isinstance(values, dict):
        return values.get(part)
    return (
        values[part]
        if isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        else None
    )


def _key(loc: tuple[str | int, ...], values: Any) -> str:
    """The dotted key of an error, without pydantic's names for the members of a union and for validators."""
    parts = []
    for part in loc:
        below = _below(values, part)
        if below is not None or not _MEMBER.fullmatch(str(part)):
            parts.append(str(part))
            values = below
    return ".".join(parts)


def _lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            yield f"{prefix}{position}", value.start_mark.line + 1
            yield from _lines(value, f"{prefix}{position}.")
