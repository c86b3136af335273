"""What every configuration class is, and configuration as YAML."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from salt_distill.common.text_files import read_text

ConfigValues = dict[str, Any]
"""Values of a configuration by key, nested as YAML gives them, before a ``Config`` has checked them."""
_MAX_VALUES = 100_000
"""Of a YAML text."""
T = TypeVar("T")


def _listed(value: Any) -> Any:
    return () if value is None else value if isinstance(value, list | tuple) else (value,)


def _plain(values: tuple[Any, ...]) -> Any:
    return None if not values else values[0] if len(values) == 1 else list(values)


Several = Annotated[tuple[T, ...], BeforeValidator(_listed), PlainSerializer(_plain)]
"""None, one or more. In files none is null, and one stands there by itself, not in a list."""


class Config(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    paths: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a path, or several, which are relative to where the command was given; or an address,
    or a name such as timm's."""

    places: ClassVar[tuple[str, ...]] = ("out",)
    """Fields that hold a path of this machine, where an address such as s3://BUCKET is refused."""

    @property
    def extras(self) -> tuple[str, ...]:
        """Optional packages that a command with this configuration needs, see ``common/extras.py``."""
        return ()

    def absolute(self) -> Self:
        """The same for processes with another working directory, such as workers on other machines."""
        paths = {
            name: _from_anywhere(value) for name in self.paths if (value := getattr(self, name)) is not None
        }
        return self.model_copy(
            update=paths | {name: value.absolute() for name, value in self if isinstance(value, Config)}
        )


_WITH_SCHEME = re.compile(r"[a-z][a-z0-9+-]*:")
"""How ``s3://BUCKET`` and ``timm:NAME`` begin."""


def _from_anywhere(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(value, tuple):
        return tuple(str(_from_anywhere(item)) for item in value)
    return (
        value if _WITH_SCHEME.match(value) else str(Path(value).absolute())
    )  # links stay: what they lead to may change


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text. Raises yaml.YAMLError, also where a few lines that refer to each other
    mean more values than anybody writes."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if _num_values(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"it means more than {_MAX_VALUES} values, by aliases of aliases")
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    finally:
        loader.dispose()


def _num_values(node: yaml.Node | None, counted: dict[int, float]) -> float:
    """Of a document, where each alias is as large as what it refers to; endless where it refers to itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = float("inf")
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_num_values(part, counted) for part in parts)
    return counted[id(node)]


def load_yaml(path: str | Path) -> ConfigValues:
    """The mapping in a YAML file."""
    try:
        loaded = parse_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: got no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: got {type(loaded).__name__}, expected a mapping of configuration keys")
    return loaded


def dump_yaml(config: Config) -> str:
    """The resolved configuration; ``load_yaml`` and validation give it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
