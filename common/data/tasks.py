"""What a decoding process is asked for: a clip of a video, all of its frames, or its bytes. It imports
neither torch nor pyarrow."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from salt_distill.common.clip import clip_digest
from salt_distill.common.config import ViewConfig
from salt_distill.common.data import views
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.data.video import decoder_name, open_video
from salt_distill.common.folders.slice import Slice

Clip = tuple[UInt8[np.ndarray, "t h w 3"], bytes]
"""Pixels, and their digest."""


@dataclass(frozen=True)
class AllFrames:
    """Frames kept for later clips, which ``Cut`` makes."""

    frames: UInt8[np.ndarray, "n h w 3"]
    times: Int64[np.ndarray, " n"] | None
    """As in ``Video``."""


@dataclass(frozen=True)
class Cut:
    """The clip that a draw takes from a video."""

    view: ViewConfig
    draw: views.Draw

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Of what ``clip`` gives."""
        return self.view.clip_shape

    def frame_idx(self, num_frames: int, times: Int64[np.ndarray, " n"] | None) -> list[int]:
        """The frames it needs."""
        return views.frame_idx(self.view, num_frames, self.draw.start, times)

    def clip(self, frames: views.Frames) -> Clip:
        """The clip from these frames."""
        pixels = views.apply(self.view, frames, self.draw)
        return pixels, clip_digest(pixels)


@dataclass(frozen=True)
class Task:
    """One video and what is wanted of it."""

    encoded: Slice | bytes
    num_frames: int
    cut: Cut | SegmentCut | None
    """None: all frames."""
    seekable: bool | None = None
    """As in ``VideoFacts``; None where nobody has looked."""


@dataclass(frozen=True)
class Decoder:
    """Does tasks with a decoder of this name, the one that the run's summary names."""

    name: str

    def __reduce__(self) -> tuple[Callable[[str], "Decoder"], tuple[str]]:
        return _load_decoder, (self.name,)

    def __call__(self, task: Task | Slice) -> Clip | AllFrames | bytes:
        """A Clip, or AllFrames where the task has no cut, or the bytes of a Slice. Raises BadVideoError."""
        if isinstance(task, Slice):
            return task.read()
        data = task.encoded if isinstance(task.encoded, bytes) else task.encoded.read()
        with open_video(data, task.num_frames, seekable=task.seekable) as video:
            if task.cut is None:
                return AllFrames(np.stack(video.frames(range(task.num_frames))), video.times)
            return task.cut.clip(video.frames(task.cut.frame_idx(task.num_frames, video.times)))


def _load_decoder(name: str) -> Decoder:
    """In a process that starts: loading torchcodec takes long, and is no part of the time that a video may
    take."""
    if decoder_name() != name:
        raise RuntimeError(
            f"got the decoder {decoder_name()} in a decoding process, expected {name} as in the process that"
            " started it"
        )
    return Decoder(name)
