"""Views: which clip a draw takes from a video, and the taking of it."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from salt_distill.common.config import ViewConfig, Views
from salt_distill.common.data.clock import paced
from salt_distill.common.draws import uniforms

Frames = list[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "t h w 3"]
"""Frames of one size."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Six numbers of [0, 1) that decide a view of any video (DESIGN section 4, View)."""

    start: float
    area: float
    ratio: float
    top: float
    left: float
    flip: float


CENTRE = Draw(start=0.5, area=0.5, ratio=0.5, top=0.5, left=0.5, flip=0.5)
"""With ``evaluation_view``: the middle frames, the largest centred square, not mirrored."""


def evaluation_view(view: ViewConfig) -> ViewConfig:
    """The view that evaluations take with ``CENTRE``: the same clip shape and stride, the largest square that
    fits, no flip."""
    return view.model_copy(update={"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": False})


def view_number(views: Views, epoch: int) -> int:
    """The number of the view that a pass over the data draws: its own, or one of K that repeat."""
    return epoch if views == "fresh" else epoch % views


def draw(data_seed: int, key: str, view_number: int) -> Draw:
    """The draw of one view of one sample."""
    start, area, ratio, top, left, flip = uniforms(data_seed, key, view_number, 6).tolist()
    return Draw(start=start, area=area, ratio=ratio, top=top, left=left, flip=flip)


def frame_idx(
    view: ViewConfig, num_frames: int, start: float, times: Int64[np.ndarray, " n"] | None = None
) -> list[int]:
    """The frames of a clip: every ``frame_step``-th from a start uniform over the possible ones.

    With ``times``, those of all frames in ticks, a step is that many usual intervals, and the nearest frame
    is taken: the same frames at a constant rate, the same pace of the clip at a variable one; a pause of the
    clock counts as one step. V-JEPA's loader spreads its 16 frames over the whole window, end included, which
    makes its stride 4.27 where 4 is configured; here the stride is what the configuration says. A video too
    short for the clip starts at 0 and repeats its last frame."""
    steps = np.arange(view.num_frames) * view.frame_step
    if times is None or num_frames == 1:
        first = int(start * max(1, num_frames - int(steps[-1])))
        return np.minimum(first + steps, num_frames - 1).tolist()
    clock, interval = paced(times, view.frame_step)
    last_start = clock[-1] - steps[-1] * interval
    first = int(start * max(1, int(np.searchsorted(clock, last_start + interval / 2, side="right"))))
    wanted = clock[first] + steps * interval
    after = np.clip(np.searchsorted(clock, wanted), 1, num_frames - 1)
    return (after - (wanted - clock[after - 1] <= clock[after] - wanted)).tolist()


def crop_box(view: ViewConfig, height: int, width: int, draw: Draw) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop, in pixels of the frame: area uniform, aspect ratio log-uniform,
    position uniform.

    A box that does not fit is shrunk at its own aspect ratio until it does (torchvision draws again; one view
    has one draw here).
    """
    area = height * width * _between(view.scale, draw.area)
    ratio = math.exp(_between((math.log(view.ratio[0]), math.log(view.ratio[1])), draw.ratio))
    crop_width = min(math.sqrt(area * ratio), width, height * ratio)
    crop_h = max(1, round(crop_width / ratio))
    crop_w = max(1, round(crop_width))
    return int(draw.top * (height - crop_h + 1)), int(draw.left * (width - crop_w + 1)), crop_h, crop_w


def apply(view: ViewConfig, frames: Frames, draw: Draw) -> UInt8[np.ndarray, "t s s 3"]:
    """The clip: ``frames`` (those of ``frame_idx``) cropped, resized to ``crop_size``, mirrored for half of
    the draws. C order."""
    frame_height, frame_width, _ = frames[0].shape
    top, left, height, width = crop_box(view, frame_height, frame_width, draw)
    crops = [frame[top : top + height, left : left + width] for frame in frames]
    return resize(crops, view.crop_size, mirror=view.flip and draw.flip < 0.5)


def resize(frames: Frames, size: int, *, mirror: bool = False) -> UInt8[np.ndarray, "t s s 3"]:
    """Bilinear, half-pixel centres, no antialias, in float32, rounded half to even: what
    ``interpolate(align_corners=False)`` computes.

    Written out, one rounding per operation, because a clip's bytes are its identity: vector libraries fuse
    multiply and add in ways that depend on the machine and on how the work was cut among threads.
    """
    height, width, _ = frames[0].shape
    top, bottom, down = _taps(height, size)
    left, right, along = _taps(width, size)
    if mirror:  # costs nothing here, and as much as the resizing afterwards
        left, right, along = left[::-1], right[::-1], along[::-1]
    channel = np.arange(3)
    left, right = ((column[:, None] * 3 + channel).ravel() for column in (left, right))
    down, along = down[:, None], along.repeat(3)
    resized = np.empty((len(frames), size, size * 3), np.uint8)
    for frame, out in zip(frames, resized, strict=True):  # by frame: stays in the processor's cache
        frame = frame.reshape(height, width * 3)
        rows = _mix(frame.take(top, 0).astype(np.float32), frame.take(bottom, 0).astype(np.float32), down)
        mixed = _mix(rows.take(left, 1), rows.take(right, 1), along)
        out[...] = np.rint(mixed, out=mixed)
    return resized.reshape(len(frames), size, size, 3)


def _taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output position: the two input positions it lies between, and its distance from the first,
    float32."""
    centre = (np.arange(size_out, dtype=np.float64) + 0.5) * (size_in / size_out) - 0.5
    centre = np.clip(centre, 0, size_in - 1)
    before = np.floor(centre).astype(np.int64)
    return before, np.minimum(before + 1, size_in - 1), (centre - before).astype(np.float32)


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """first + (second - first) * weight, in ``second``'s memory; it stays between the two, so nothing has to
    be clamped."""
    second -= first
    second *= weight
    second += first
    return second


def _between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * share
