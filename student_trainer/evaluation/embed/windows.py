"""Which frames of a video give a clip: one clip in its middle, or one of each window of some seconds."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from salt_distill.common.clip import clip_digest
from salt_distill.common.config import ViewConfig
from salt_distill.common.data.clock import usual_interval
from salt_distill.common.data.segments import centred_box
from salt_distill.common.data.views import Frames, frame_idx, resize


@dataclass(frozen=True)
class Window:
    """A part of a video, in seconds from its first frame."""

    start_s: float
    end_s: float


@dataclass(frozen=True)
class WindowsCut:
    """The clips of several windows, for ``Task``: the middle of each frame."""

    view: ViewConfig
    windows: tuple[Window, ...]
    duration_s: float
    """Of the video."""
    is_spread: bool = True
    """A clip's frames are spread over its window; else it is the one clip in the middle of the video, as
    ``salt-eval rank`` takes it."""

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Of what ``clip`` gives: the frames of all clips one after the other."""
        t, h, w, c = self.view.clip_shape
        return (len(self.windows) * t, h, w, c)

    def frame_idx(self, num_frames: int, times: Int64[np.ndarray, " n"] | None) -> list[int]:
        """The frames of all windows: those that stand when each equal part of a window is half over."""
        if not self.is_spread:
            return frame_idx(self.view, num_frames, 0.5, times)
        begins_s = self._begins_s(num_frames, times)
        shares = (np.arange(self.view.num_frames) + 0.5) / self.view.num_frames
        wanted_s = [window.start_s + shares * (window.end_s - window.start_s) for window in self.windows]
        at = np.searchsorted(begins_s, np.concatenate(wanted_s) + 1e-9, side="right") - 1
        return at.clip(0, num_frames - 1).tolist()

    def _begins_s(self, num_frames: int, times: Int64[np.ndarray, " n"] | None) -> Float64[np.ndarray, " n"]:
        """When each frame begins: by its time where the file tells it, else at a constant rate."""
        if times is None or num_frames == 1:
            return np.arange(num_frames) * (self.duration_s / num_frames)
        ticks = times - times[0]
        return ticks * (self.duration_s / (ticks[-1] + usual_interval(times)))

    def clip(self, frames: Frames) -> tuple[UInt8[np.ndarray, "n rows columns 3"], bytes]:
        """Every clip, and the digest of all."""
        height, width, _ = frames[0].shape
        top, left, high, wide = centred_box(self.view, height, width, 0.5, 1.0)
        crops = [frame[top : top + high, left : left + wide] for frame in frames]
        pixels = resize(crops, self.view.height, self.view.width)
        return pixels, clip_digest(pixels)


def windows_of(
    num_frames: int, fps: float, view: ViewConfig, window_s: float | None, stride_s: float | None
) -> list[Window]:
    """The windows of a video: without ``window_s`` the clip in its middle, whose seconds are those at the
    mean rate. With it as many windows as fit, and at least one."""
    if window_s is None:
        frames = frame_idx(view, num_frames, 0.5)
        return [Window(frames[0] / fps, (frames[-1] + 1) / fps)]
    duration_s, stride_s = num_frames / fps, stride_s or window_s
    count = max(1, int((duration_s - window_s) / stride_s + 1 + 1e-6))
    starts_s = [number * stride_s for number in range(count)]
    return [Window(start_s, min(start_s + window_s, duration_s)) for start_s in starts_s]
