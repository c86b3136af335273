"""One video of a data set, and the JSON beside it in its tar (DESIGN section 4, Shards)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.stills import content_hash, stills_in
from salt_distill.common.data.video_facts import VideoFacts

CLASS = "class"
"""Name of a label that comes without one, as WebDataset's ``.cls`` and V-JEPA's lists do."""
MAX_CLASSES = 1_000_000
"""Of a label: all of them are listed in ``dataset.json``."""
_MOST = 2**40
"""More than any count, size or duration of a video."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What the JSON beside a video in a tar holds (DESIGN section 4, Shards)."""

    key: str
    """``source/name``, unique over the data set."""
    labels: dict[str, int]
    split: str
    num_frames: int
    fps: float
    width: int
    """Pixels, as displayed."""
    height: int
    duration_s: float
    codec: str
    sha256: str
    """Of the encoded bytes, hex; of a frame folder: of its images, one after the other."""
    source: str
    seekable: bool | None
    """As in ``VideoFacts``; None where whoever packed it did not look."""

    def to_json(self) -> bytes:
        """As it stands in a tar."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()


@dataclass(frozen=True, kw_only=True)
class Sample(Sidecar):
    """One video of a data set."""

    tar: str
    """Relative to the data set's folder."""
    offset: int
    """Of the encoded bytes in the tar."""
    size: int
    """Of the encoded bytes."""


_ADDED_LATER = frozenset(["seekable"])
"""Fields that older sidecars do not have."""
SIDECAR_FIELDS = tuple(field.name for field in fields(Sidecar))


def sidecar_of(
    key: str, sha256: str, facts: VideoFacts, *, labels: dict[str, int], split: str, source: str
) -> Sidecar:
    """That of a video that was probed."""
    return Sidecar(key=key, labels=labels, split=split, **asdict(facts), sha256=sha256, source=source)


def is_sidecar(facts: Any) -> bool:
    """Whether this JSON has the fields that `salt-data pack` writes."""
    return isinstance(facts, dict) and set(facts) | _ADDED_LATER == set(SIDECAR_FIELDS)


def require_sidecar(facts: Mapping[str, Any]) -> Sidecar:
    """A sidecar whose values are what they should be. Raises BadVideoError."""
    facts = {"seekable": None, **facts}
    texts = ("key", "split", "codec", "sha256", "source")
    good = {name: _is_text(facts[name]) for name in texts}
    good |= {name: _is_positive(facts[name]) for name in ("fps", "duration_s")}
    good |= {
        name: _is_positive(facts[name]) and isinstance(facts[name], int)
        for name in ("num_frames", "width", "height")
    }
    good |= {
        "labels": _are_labels(facts["labels"]),
        "seekable": facts["seekable"] is None or isinstance(facts["seekable"], bool),
    }
    for name, is_good in good.items():
        if not is_good:
            raise BadVideoError(
                f"its .json gives {name} as {str(facts[name])[:60]!r}, expected what `salt-data pack` writes"
            )
    return Sidecar(**facts)


def _are_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(label) and type(number) is int and 0 <= number < MAX_CLASSES
        for label, number in value.items()
    )


def _is_text(value: Any) -> bool:
    """Whether it is text that can be written anywhere."""
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < _MOST


def sha256_of(data: bytes) -> str:
    """A sample's ``sha256``."""
    return content_hash(stills_in(data) or [data])
