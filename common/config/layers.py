"""A configuration from layers (preset, file, flags), and errors that name where a wrong value was given."""

import difflib
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from salt_distill.common.config.base import Config, ConfigValues, parse_yaml
from salt_distill.common.text_files import read_text

_MEMBER = re.compile(r"[A-Z]\w*|int|str|float|bool|.*[\[-].*")
"""What pydantic calls a class, a plain type, ``literal['fresh']`` and ``function-after[...]``."""
Place = Callable[[str], str]
"""Of a dotted key, where it was given."""


@dataclass(frozen=True)
class Layer:
    """Values of one place, nested as the configuration is."""

    values: ConfigValues
    place: Place
    """What an error calls a key of it, such as ``run.yaml, line 3: optim.lr``."""
    is_file: bool = False
    """An error then says the flag too."""


def read_layer(path: str | Path) -> Layer:
    """The keys of a YAML file, nested or dotted. Raises ValueError with the line where it is no YAML."""
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
        while key not in lines and "." in key:
            key = key.rpartition(".")[0]
        return f"{path}, line {lines[key]}" if key in lines else str(path)

    return Layer(nested(loaded), lambda key: f"{place(key)}: {key}", is_file=True)


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


def suggestion(key: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown key."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    if not close:  # a nested key that was given without its group
        close = [name for name in known if name.rpartition(".")[2] == key][:1]
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(known)}"


def explain(
    error: pydantic.ValidationError,
    layers: Sequence[Layer] = (),
    config_class: type[Config] | None = None,
    unset: Place = str,
) -> str:
    """One line per wrong value: where it was given, what was got, what was expected. ``unset``: the name of a
    key that no layer gives."""
    known = [] if config_class is None else list(keys_of(config_class))
    values = merge(*(layer.values for layer in layers)) if layers else None
    lines: dict[tuple[str, str, str], list[str]] = {}
    errors = [(_key(item["loc"], values), item) for item in error.errors()]
    for key, item in errors:
        if item["type"] == "too_short" and any(below.startswith(f"{key}.") for below, _ in errors):
            continue  # it misses what is wrong
        layer, given = _where(key, layers)
        place = unset(key) if layer is None else layer.place(given)
        place += f": {key}" if given and given != key else ""
        got = "" if item["type"] in _WITHOUT_VALUE else f"got {item['input']!r}, "
        if item["type"] == "extra_forbidden":
            sentence, flag = f"unknown key{suggestion(key, known) if known else ''}", ""
        else:
            sentence = _EXPECTED.get(item["type"], _as_it_is)(item)
            flag = f" (as a flag: {flag_of(key)})" if key and layer is not None and layer.is_file else ""
        sentences = lines.setdefault((place if key else "", got, flag), [])
        if sentence not in sentences:
            sentences.append(sentence)
    return "\n".join(
        f"{place}{' ' if sentences == ['is required'] else ': ' if place else ''}{got}"
        f"{' or '.join(sentences).replace(' or expected', ' or')}{flag}"
        for (place, got, flag), sentences in lines.items()
    )


def _where(key: str, layers: Sequence[Layer]) -> tuple[Layer | None, str]:
    """The layer that gives a key, or the nearest one above it, and that key."""
    while key:
        for layer in reversed(layers):
            if _has(layer.values, key):
                return layer, key
        key = key.rpartition(".")[0]
    return None, ""


def _has(values: Any, key: str) -> bool:
    for part in key.split("."):
        values = _below(values, int(part) if part.isdecimal() else part)
    return values is not None


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


def _as_it_is(item: Any) -> str:
    return item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")


def _choices(item: Any) -> str:
    choices = item["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
    return f"expected {'one of ' if ',' in choices else ''}{choices}"


def _said(sentence: str) -> Callable[[Any], str]:
    return lambda item: sentence.format(**item.get("ctx", {}))


_WITHOUT_VALUE = {"missing", "value_error", "extra_forbidden"}
"""Kinds of errors that do not say what was got, or say it themselves."""
_EXPECTED: dict[str, Callable[[Any], str]] = {
    "missing": _said("is required"),
    "literal_error": _choices,
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), _said("expected a whole number")),
    **dict.fromkeys(("float_parsing", "float_type"), _said("expected a number")),
    **dict.fromkeys(("bool_parsing", "bool_type"), _said("expected true or false")),
    "string_type": _said("expected a text"),
    "none_required": _said("expected nothing"),
    "greater_than": _said("expected more than {gt:g}"),
    "greater_than_equal": _said("expected at least {ge:g}"),
    "less_than": _said("expected less than {lt:g}"),
    "less_than_equal": _said("expected at most {le:g}"),
    **dict.fromkeys(("tuple_type", "list_type"), _said("expected a list")),
    "too_short": _said("expected at least {min_length} of them"),
    "too_long": _said("expected at most {max_length} of them"),
    "string_pattern_mismatch": _said("expected a text that matches {pattern}"),
    "string_too_short": _said("expected a text of at least {min_length} characters"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), _said("expected keys and values")),
}
"""How each kind of pydantic's errors is said."""
