"""What every configuration class is, and configuration as layers, YAML and error messages."""

from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries in one; later layers win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    loaded = yaml.safe_load(Path(path).read_text())
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: got {type(loaded).__name__}, expected a mapping of configuration keys")
    return loaded


def dump_yaml(config: Config) -> str:
    """The resolved configuration; ``load_yaml`` and validation give it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def explain(error: pydantic.ValidationError) -> str:
    """One line per wrong value: its path, what was got, what was expected."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if part != "function-after")
        got = "" if item["type"] in ("missing", "value_error") else f", got {item['input']!r}"
        lines.append(f"{path + ': ' if path else ''}{item['msg'].removeprefix('Value error, ')}{got}")
    return "\n".join(lines)
