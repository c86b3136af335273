"""A wrong value in a sentence: what was got, and what was expected instead."""

import datetime
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

_LONGEST = 120
"""Characters of a value that a sentence shows."""

NAME_PARTS = "up to 64 letters, digits, '.', '_' and '-'"
"""What a name in an address is made of."""


def matching(pattern: str, expected: str) -> AfterValidator:
    """For a text that matches a regular expression; ``expected`` says the expression in words."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"got {shown(value)}, expected {expected}")
        return value

    return AfterValidator(check)


Name = Annotated[str, matching("[A-Za-z0-9._-]{1,64}", NAME_PARTS)]
PngFile = Annotated[str, matching(r"(?i:.*\.png)", "a file name that ends in .png")]


def shown(value: Any) -> str:
    """A value as YAML has it, texts in quotes; a long one is cut."""
    text = _as_yaml(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def expected(item: Mapping[str, Any]) -> str:
    """What one of pydantic's errors expects, by its kind; or the sentence of our own check."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in _SENTENCES:
        return _SENTENCES[kind]
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        choices: str = context["expected"].replace("'", "").replace(" or ", ", ")
        if choices in ("True", "False"):
            choices = choices.lower()
        return f"expected {'one of ' if ',' in choices else ''}{choices}"
    if kind == "string_type" and isinstance(item["input"], int | float | datetime.date):
        return "expected a text: put it in quotes"
    if kind == "int_parsing" and (whole := _whole_number(item["input"])) is not None:
        return f"expected a whole number: write {whole}"
    if kind == "string_too_short" and context["min_length"] == 1:
        return "expected a text that is not empty"
    sentence = _EXPECTED.get(kind) or _of_family(kind)
    return f"expected {sentence.format(**{name: _limit(value) for name, value in context.items()})}"


def at(place: str, item: Mapping[str, Any]) -> str:
    """What one error expects, and where."""
    sentence = expected(item)
    return f"{place}{' ' if sentence == MISSING else ': '}{sentence}"


def says_what_it_got(item: Mapping[str, Any]) -> bool:
    """Whether the value is said by ``expected`` already, or there is none."""
    return item["type"] in (*_SENTENCES, "value_error")


def described(field: FieldInfo, *, is_part: bool) -> str | None:
    """What a field takes, in words, where that says more than the kind of an error: of a list, and of several
    kinds of values. ``is_part``: the error is of an item of the list."""
    members = list(members_of(field.annotation, tuple(field.metadata)))
    kind, _ = members[0]
    if configs_in(field.annotation) or (len(members) == 1 and typing.get_origin(kind) is not tuple):
        return None
    if is_part and Ellipsis in typing.get_args(kind):  # the item alone is wrong
        return None
    words = ", or ".join(_kind_in_words(kind, limits) for kind, limits in members)
    example = field.get_default(call_default_factory=True)
    such_as = f", such as {shown(example)}" if isinstance(example, tuple) and example else ""
    return f"expected {words}{such_as}"


def configs_in(annotation: Any) -> list[type[BaseModel]]:
    """The configurations that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for part in typing.get_args(annotation) for config in configs_in(part)]


def members_of(annotation: Any, limits: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The alternatives of a type but None, without ``Annotated`` and unions around them; each with its
    limits."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        kind, *more = typing.get_args(annotation)
        inner = [
            limit for mark in more for limit in (mark.metadata if isinstance(mark, FieldInfo) else [mark])
        ]
        yield from members_of(kind, (*limits, *inner))
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from members_of(member, limits)
    elif annotation is not types.NoneType:
        yield annotation, limits


def _kind_in_words(kind: Any, limits: Collection[Any]) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        items = [item for item in typing.get_args(kind) if item is not Ellipsis]
        number = "" if Ellipsis in typing.get_args(kind) else f"{len(items)} "
        [(item, below)] = members_of(items[0])
        return f"a list of {number}{_PLURALS.get(item, 'texts')}{_limits_in_words(below)}"
    return _WORDS.get(kind, "a text") + (_limits_in_words(limits) if kind in (int, float) else "")


def _limits_in_words(limits: Collection[Any]) -> str:
    words = " and ".join(
        f"{said} {_limit(getattr(limit, name))}"
        for limit in limits
        for mark, name, said in _LIMITS
        if isinstance(limit, mark)
    )
    return (" of " if words.startswith("at ") else " " if words else "") + words


def _limit(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}" if value >= 1_000_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _as_yaml(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case datetime.date():
            return f"the date {value}"
        case dict():
            return (
                "{" + ", ".join(f"{_key_as_yaml(key)}: {_as_yaml(item)}" for key, item in value.items()) + "}"
            )
        case list() | tuple() | set():
            return "[" + ", ".join(map(_as_yaml, value)) + "]"
    return repr(value) if isinstance(value, str | int | float | bytes) else f"something like {str(value)!r}"


def _key_as_yaml(key: Any) -> str:
    return key if isinstance(key, str) else _as_yaml(key)


def _whole_number(text: Any) -> int | None:
    """Of 1e5 and 100000.0, which are none as they are written."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _of_family(kind: str) -> str:
    """For kinds that nothing here has yet: ``date_parsing`` expects a date."""
    return _FAMILIES.get(kind.partition("_")[0], "another kind of value")


MISSING = "is required"
_SENTENCES = {"missing": MISSING, "extra_forbidden": "unknown key"}
_LIMITS = ((Gt, "gt", "more than"), (Ge, "ge", "at least"), (Lt, "lt", "less than"), (Le, "le", "at most"))
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_FAMILIES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "bytes": "a text",
    "tuple": "a list",
    "list": "a list",
    "set": "a list",
    "dict": "keys and values",
    "mapping": "keys and values",
    "model": "keys and values",
    "json": "JSON",
    "date": "a date",
    "datetime": "a date with a time",
    "url": "a URL",
}
_EXPECTED: dict[str, str] = {
    "finite_number": "a finite number",
    "none_required": "nothing",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "int_parsing_size": "a smaller number",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "string_unicode": "a text in UTF-8",
    "invalid_key": "a text as the key: put it in quotes",
    "json_invalid": "JSON",
}
"""What a kind of pydantic's errors expects, where its first word does not say it."""
