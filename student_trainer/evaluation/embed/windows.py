"""Which frames of a video give a clip: one clip in its middle, or one of each window of some seconds."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from salt_distill.common.clip import clip_digest
from salt_distill.common.config import ViewConfig
from salt_distill.common.data.segments import square_box
from salt_distill.common.data.views import Frames, frame_idx, resize


@dataclass(frozen=True)
class Window:
    """A part of a video, in seconds by its mean frame rate."""

    start_s: float
    end_s: float
    frames: tuple[int, ...]
    """Of its clip."""


@dataclass(frozen=True)
class WindowsCut:
    """The clips of several windows, for ``Task``: the square in the middle of each frame."""

    view: ViewConfig
    windows: tuple[Window, ...]

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Of what ``clip`` gives: the frames of all clips one after the other."""
        t, h, w, c = self.view.clip_shape
        return (len(self.windows) * t, h, w, c)

    def frame_idx(self, num_frames: int, times: Int64[np.ndarray, " n"] | None) -> list[int]:
        """The frames of all windows."""
        return [frame for window in self.windows for frame in window.frames]

    def clip(self, frames: Frames) -> tuple[UInt8[np.ndarray, "n s s 3"], bytes]:
        """Every clip, and the digest of all."""
        height, width, _ = frames[0].shape
        top, left, side, _ = square_box(height, width, 0.5, 1.0)
        squares = [frame[top : top + side, left : left + side] for frame in frames]
        pixels = resize(squares, self.view.crop_size)
        return pixels, clip_digest(pixels)


def windows_of(
    num_frames: int, fps: float, view: ViewConfig, window_s: float | None, stride_s: float | None
) -> list[Window]:
    """The windows of a video: without ``window_s`` the clip in its middle. With it as many windows as fit,
    and at least one; the frames of a clip lie in the middles of equal parts of its window."""
    if window_s is None:
        frames = frame_idx(view, num_frames, 0.5)
        return [Window(frames[0] / fps, (frames[-1] + 1) / fps, tuple(frames))]
    duration_s, stride_s = num_frames / fps, stride_s or window_s
    count = max(1, int((duration_s - window_s) / stride_s + 1 + 1e-6))
    shares = (np.arange(view.num_frames) + 0.5) / view.num_frames
    windows = []
    for number in range(count):
        start_s = number * stride_s
        end_s = min(start_s + window_s, duration_s)
        frames = np.floor((start_s + shares * (end_s - start_s)) * fps).astype(int).clip(0, num_frames - 1)
        windows.append(Window(start_s, end_s, tuple(frames.tolist())))
    return windows
