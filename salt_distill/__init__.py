"""SALT as a service: video encoders learned from a frozen, shared, cached teacher.

The names below are the public ones: what is under them may move. Each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salt_distill.api import CachedTargets, Clips, TeacherClient, load_encoder, masks
    from salt_distill.common.clip import ClipBatch
    from salt_distill.common.model.masking import MaskGroup, MaskSet
    from salt_distill.common.model.pixels import normalise

__all__ = [
    "CachedTargets",
    "ClipBatch",
    "Clips",
    "MaskGroup",
    "MaskSet",
    "TeacherClient",
    "load_encoder",
    "masks",
    "normalise",
]
_ELSEWHERE = {
    "ClipBatch": "salt_distill.common.clip",
    "MaskGroup": "salt_distill.common.model.masking",
    "MaskSet": "salt_distill.common.model.masking",
    "normalise": "salt_distill.common.model.pixels",
}
"""Modules of the names that are not in ``salt_distill.api``."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("salt-distill")
    if name not in __all__:
        raise AttributeError(f"module 'salt_distill' has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "salt_distill.api")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
