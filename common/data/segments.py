"""The clips that an evaluation takes from one video: one of each of its segments, and of each of those one or
more crops."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from salt_distill.common.clip import clip_digest
from salt_distill.common.config import ViewConfig
from salt_distill.common.data.views import Draw, Frames, clip_span, crop_box, frame_idx, resize


@dataclass(frozen=True)
class SegmentCut:
    """Clips of a video's segments, for ``Task`` (V-JEPA 2's evaluations; its segments start at random, these
    at the middle unless drawn)."""

    view: ViewConfig
    num_segments: int
    num_views: int
    """Crops along the side that has more than a clip needs: the middle one, or equally spaced from end to
    end."""
    square: float
    """Their side, as a share of that of the largest crop: of a square clip, the frame's shorter side."""
    draws: tuple[Draw, ...] = ()
    """One for each segment: its start and its crop, in place of the middle and of those crops."""

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Of what ``clip`` gives: the frames of all clips one after the other, view by view, segment by
        segment."""
        t, h, w, c = self.view.clip_shape
        return (self.num_views * self.num_segments * t, h, w, c)

    def frame_idx(self, num_frames: int, times: Int64[np.ndarray, " n"] | None) -> list[int]:
        """The frames of all segments."""
        starts = [draw.start for draw in self.draws] or [0.5] * self.num_segments
        shares = [
            segment_start(self.view, num_frames, number, self.num_segments, start)
            for number, start in enumerate(starts)
        ]
        return [idx for share in shares for idx in frame_idx(self.view, num_frames, share, times)]

    def clip(self, frames: Frames) -> tuple[UInt8[np.ndarray, "t rows columns 3"], bytes]:
        """Every clip, and the digest of all."""
        height, width, _ = frames[0].shape
        t = self.view.num_frames
        if self.draws:
            boxes = [
                [(number, crop_box(self.view, height, width, draw)) for number, draw in enumerate(self.draws)]
            ]
        else:
            positions = np.linspace(0, 1, self.num_views) if self.num_views > 1 else [0.5]
            crops = [centred_box(self.view, height, width, position, self.square) for position in positions]
            boxes = [[(number, box) for number in range(self.num_segments)] for box in crops]
        clips = [
            resize(
                [frame[top : top + h, left : left + w] for frame in frames[number * t : (number + 1) * t]],
                self.view.height,
                self.view.width,
            )
            for of_view in boxes
            for number, (top, left, h, w) in of_view
        ]
        pixels = np.concatenate(clips) if len(clips) > 1 else clips[0]
        return pixels, clip_digest(pixels)


def segment_start(view: ViewConfig, num_frames: int, number: int, num_segments: int, start: float) -> float:
    """Where among a video's possible starts, as a share of them, the clip of a segment begins; ``start``:
    where within the segment.

    Segments too short for a clip have clips that overlap, spread evenly from the first frame to the last.
    """
    if num_segments == 1:
        return start
    span = clip_span(view)
    num_starts, segment = max(1, num_frames - span + 1), num_frames / num_segments
    first = (
        number * segment + start * (segment - span + 1)
        if segment >= span
        else number * (num_starts - 1) / (num_segments - 1)
    )
    return (min(int(first), num_starts - 1) + 0.5) / num_starts


def centred_box(
    view: ViewConfig, height: int, width: int, position: float, share: float
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of a clip's shape whose sides are ``share`` of those of the
    largest in the frame: in the middle of the side that the largest fills, and at ``position`` along the
    other."""
    ratio = view.width / view.height
    largest = min(height, width / ratio)  # its height
    box = max(1, round(largest * share)), max(1, min(width, round(largest * ratio * share)))
    along = (position, 0.5) if height * ratio > width else (0.5, position)
    top, left = (
        min(int(place * (extent - side + 1)), extent - side)
        for place, extent, side in zip(along, (height, width), box, strict=True)
    )
    return top, left, *box
