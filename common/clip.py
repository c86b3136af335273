"""What a clip is on its way from a video to a teacher."""

import struct
from dataclasses import dataclass

import blake3
import numpy as np
from jaxtyping import Bool, UInt8


class BadVideoError(ValueError):
    """A video that cannot be used; the message is the reason, one sentence without the video's name."""


def clip_digest(clip: UInt8[np.ndarray, "t h w 3"]) -> bytes:
    """A clip's identity everywhere (wire, coalescing, cache, logs): BLAKE3-256 of its shape as four
    little-endian int64, then its bytes."""
    hasher = blake3.blake3(struct.pack("<4q", *clip.shape))
    hasher.update(np.ascontiguousarray(clip).data)
    return hasher.digest()


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Clips of consecutive rows of a global batch, in order."""

    pixels: UInt8[np.ndarray, "b t h w 3"]
    """RGB, after crop, resize and flip, before normalisation; zeros where the clip is bad."""
    digests: tuple[bytes, ...]
    """``clip_digest`` of each row."""
    keys: tuple[str, ...]
    """The sample of each row."""
    views: tuple[int, ...]
    """The view number of each row."""
    good: Bool[np.ndarray, " b"]
    """False where the video could not be decoded: the row keeps its slot, with weight 0."""

    def distinct(self) -> dict[bytes, list[int]]:
        """The rows of each distinct good clip, in order: a small data set may have one clip twice in a
        batch."""
        rows: dict[bytes, list[int]] = {}
        for row, digest in enumerate(self.digests):
            if self.good[row]:
                rows.setdefault(digest, []).append(row)
        return rows
