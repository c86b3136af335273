"""Type, unit and default of a configuration value, in words."""

import re
import types
import typing
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

UNITS = {
    "_s": "seconds",
    "_ms": "milliseconds",
    "_minutes": "minutes",
    "_hours": "hours",
    "_bytes": "bytes",
    "_gbps": "Gbit/s",
    "_gb_per_s": "GB/s",
    "_clips_per_s": "clips/s",
    "_clips": "clips",
    "_frames": "frames",
    "fps": "frames/s",
    "steps": "steps",
    "batch_size": "clips",
    "_size": "pixels",
    "short_side": "pixels",
    "frame_step": "frames",
}
"""The unit of a value by the end of its name, the longest that fits."""
_IN_DESCRIPTION = re.compile(
    r", in (seconds|milliseconds|minutes|hours|bytes|pixels|frames|clips|steps|tokens)\b"
)
_PLAIN = {
    int: "whole number",
    float: "number",
    str: "text",
    SecretStr: "text",
    bool: "true or false",
    Any: "any value",
}


def type_of(field: FieldInfo) -> str:
    """Such as ``whole number, at least 1``."""
    bounds = [bound for each in _metadata(field) if (bound := _bound(each))]
    return ", ".join([_type(field.annotation), *dict.fromkeys(bounds)])


def unit_of(name: str, description: str) -> str:
    """The unit that a description or a name gives; empty where there is none."""
    if found := _IN_DESCRIPTION.search(description):
        return found[1]
    ends = [end for end in UNITS if name.endswith(end)]
    return UNITS[max(ends, key=len)] if ends else ""


def default_of(field: FieldInfo) -> str:
    """As it is typed; ``required`` where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _metadata(field: FieldInfo) -> list[Any]:
    """The bounds of a field and of the alternatives of its type."""
    found, left = list(field.metadata), [field.annotation]
    while left:
        annotation = left.pop()
        if typing.get_origin(annotation) is typing.Annotated:
            found += annotation.__metadata__
        left += [
            each
            for each in typing.get_args(annotation)
            if typing.get_origin(annotation) is not typing.Literal
        ]
    return found


def _bound(constraint: Any) -> str:
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    for name, text in words.items():
        if (limit := getattr(constraint, name, None)) is not None:
            return f"{text} {limit:g}"
    return ""


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(each) for each in arguments if each is not types.NoneType))
    if origin is typing.Literal:
        return "one of " + ", ".join(
            f"`{str(choice).lower() if choice in (True, False) else choice}`" for choice in arguments
        )
    if origin in (tuple, list):
        return "list of " + ", ".join(
            dict.fromkeys(_type(each) for each in arguments if each is not Ellipsis)
        )
    if origin is dict:
        return f"keys with {_type(arguments[1])}"
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    name = getattr(annotation, "__name__", str(annotation))
    return f"[{name}](#{name.lower()})"
