"""Marks on configuration fields: what else a field decides, said where it stands."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from salt_distill.common.config.base import Config


@dataclass(frozen=True)
class OnResume:
    """The field, with all below it, may differ between a run and its continuation. A field without this mark
    decides what is learned."""

    effect: str
    """What another value does, for docs/training.md."""


@dataclass(frozen=True)
class Shown:
    """Others see the field on a service's board, or with a tracker: it says what a run learns and how. No
    place, which may hold secrets, and nothing of this machine has it."""


@dataclass(frozen=True)
class DecidedBySweep:
    """No sweep's file may have the field: the sweep decides it."""


M = TypeVar("M", OnResume, Shown, DecidedBySweep)


def marked(config_class: type[Config], mark: type[M], above: str = "") -> Iterator[tuple[str, M]]:
    """The keys of the fields that carry a mark, as ``--set`` names them, each with its mark."""
    for name, field in config_class.model_fields.items():
        mine = next((item for item in field.metadata if isinstance(item, mark)), None)
        if mine is not None:
            yield above + name, mine
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from marked(field.annotation, mark, f"{above}{name}.")
