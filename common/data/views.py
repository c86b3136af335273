"""Views: which clip a draw takes from a video, and the taking of it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from pydantic import JsonValue

from salt_distill.common.config import ViewConfig, Views
from salt_distill.common.data.clock import paced
from salt_distill.common.draws import uniforms

Frames = list[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "t h w 3"]
"""Frames of one size."""


VIEW_VERSION = 2
"""Of the way from a draw to a clip: raised where equal draws give another clip. Version 1 shrank a box that
did not fit into the frame."""
NUM_TRIES = 10
"""Boxes that are tried for a crop."""


class BoxTry(NamedTuple):
    """Four numbers of [0, 1) that decide a box, which may not fit into the frame."""

    area: float
    ratio: float
    top: float
    left: float


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Numbers of [0, 1) that decide a view of any video (DESIGN section 4, View)."""

    start: float
    flip: float
    tries: tuple[BoxTry, ...]
    """Of which the first that fits into the frame is the crop."""


def view_facts(view: ViewConfig) -> dict[str, JsonValue]:
    """What a manifest says of views, beside their draws: the configuration, and the version."""
    return {**view.model_dump(mode="json"), "version": VIEW_VERSION}


def view_number(views: Views, epoch: int) -> int:
    """The number of the view that a pass over the data draws: its own, or one of K that repeat."""
    return epoch if views == "fresh" else epoch % views


def draw(data_seed: int, key: str, view_number: int) -> Draw:
    """The draw of one view of one sample."""
    start, flip, *boxes = uniforms(data_seed, key, view_number, 2 + 4 * NUM_TRIES).tolist()
    tries = tuple(BoxTry(*boxes[first : first + 4]) for first in range(0, len(boxes), 4))
    return Draw(start=start, flip=flip, tries=tries)


def frame_idx(
    view: ViewConfig, num_frames: int, start: float, times: Int64[np.ndarray, " n"] | None = None
) -> list[int]:
    """The frames of a clip, from a start uniform over the possible ones.

    With ``times``, those of all frames in ticks, a step is that many usual intervals, and the nearest frame
    is taken: the same frames at a constant rate, the same pace of the clip at a variable one; a gap in the
    times counts as one step. A video too short for the clip starts at 0 and repeats its last frame.
    """
    steps, span = _steps(view, num_frames), clip_span(view)
    if times is None or num_frames == 1:
        first = int(start * max(1, num_frames - span + 1))
        return np.minimum(first + steps, num_frames - 1).tolist()
    clock, interval = paced(times, view.frame_step)
    last_start = clock[-1] - (span - 1) * interval
    first = int(start * max(1, int(np.searchsorted(clock, last_start + interval / 2, side="right"))))
    wanted = clock[first] + steps * interval
    after = np.clip(np.searchsorted(clock, wanted), 1, num_frames - 1)
    return (after - (wanted - clock[after - 1] <= clock[after] - wanted)).tolist()


def clip_span(view: ViewConfig) -> int:
    """Frames of the shortest video that has one possible start: all that a clip covers. Of a ``window`` the
    reference leaves the last possible start out, so one more."""
    if view.sampling == "window":
        return view.num_frames * view.frame_step + 1
    return (view.num_frames - 1) * view.frame_step + 1


def _steps(view: ViewConfig, num_frames: int) -> Int64[np.ndarray, " t"]:
    """The frames of a clip, counted from its first one."""
    if view.sampling == "step":
        return np.arange(view.num_frames) * view.frame_step
    window = min(num_frames, view.num_frames * view.frame_step)
    spread = np.linspace(0, window, window // view.frame_step)
    repeated = np.full(view.num_frames - len(spread), window)
    return np.minimum(np.concatenate([spread, repeated]), window - 1).astype(np.int64)


def crop_box(view: ViewConfig, height: int, width: int, draw: Draw) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop, in pixels of the frame, as torchvision's and V-JEPA's random
    resized crop: area uniform, aspect ratio log-uniform, position uniform; the first try that fits, else the
    largest centred box whose ratio is allowed."""
    low, high = (ratio * (view.width / view.height) for ratio in view.ratio)
    for box in draw.tries:
        area = height * width * _between(view.scale, box.area)
        ratio = math.exp(_between((math.log(low), math.log(high)), box.ratio))
        crop_h, crop_w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_h <= height and 0 < crop_w <= width:
            top, left = int(box.top * (height - crop_h + 1)), int(box.left * (width - crop_w + 1))
            return top, left, crop_h, crop_w
    crop_h = min(height, max(1, round(width / low)))
    crop_w = min(width, max(1, round(height * high)))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def apply(view: ViewConfig, frames: Frames, draw: Draw) -> UInt8[np.ndarray, "t rows columns 3"]:
    """The clip: ``frames`` (those of ``frame_idx``) cropped, resized to ``crop_size``, mirrored for half of
    the draws. C order."""
    frame_height, frame_width, _ = frames[0].shape
    top, left, height, width = crop_box(view, frame_height, frame_width, draw)
    crops = [frame[top : top + height, left : left + width] for frame in frames]
    return resize(crops, view.height, view.width, mirror=view.flip and draw.flip < 0.5)


def resize(
    frames: Frames, out_height: int, out_width: int, *, mirror: bool = False
) -> UInt8[np.ndarray, "t rows columns 3"]:
    """Bilinear, half-pixel centres, no antialias, in float32, rounded half to even: what
    ``interpolate(align_corners=False)`` computes.

    Written out, one rounding per operation, because a clip's bytes are its identity: vector libraries fuse
    multiply and add in ways that depend on the machine and on how the work was cut among threads.
    """
    height, width, _ = frames[0].shape
    top, bottom, down = _taps(height, out_height)
    left, right, along = _taps(width, out_width)
    if mirror:  # costs nothing here, and as much as the resizing afterwards
        left, right, along = left[::-1], right[::-1], along[::-1]
    channel = np.arange(3)
    left, right = ((column[:, None] * 3 + channel).ravel() for column in (left, right))
    down, along = down[:, None], along.repeat(3)
    resized = np.empty((len(frames), out_height, out_width * 3), np.uint8)
    for frame, out in zip(frames, resized, strict=True):  # by frame: stays in the processor's cache
        frame = frame.reshape(height, width * 3)
        rows = _mix(frame.take(top, 0).astype(np.float32), frame.take(bottom, 0).astype(np.float32), down)
        mixed = _mix(rows.take(left, 1), rows.take(right, 1), along)
        out[...] = np.rint(mixed, out=mixed)
    return resized.reshape(len(frames), out_height, out_width, 3)


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
