"""The times of a video's frames: their usual interval, the rate and length that they give, and the pace of a
clip."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float64, Int64

from salt_distill.common.clip import BadVideoError

_LONGEST_REGULAR = 3
"""An interval that is more than so many times the median one is a gap."""


def usual_interval(times: Int64[np.ndarray, " n"]) -> float:
    """Ticks from a frame to the next one: the mean, without the gaps. At least two frames, ascending.

    The mean, since times are often rounded (33, 33, 34 ms); without gaps, since one pause of a minute would
    make it useless.
    """
    intervals = np.diff(times)
    return float(intervals[~_gaps(intervals)].mean())


def paced(times: Int64[np.ndarray, " n"], frame_step: int) -> tuple[Float64[np.ndarray, " n"], float]:
    """Where each frame stands on the clock of a clip whose frames are ``frame_step`` usual intervals apart,
    and that interval; in ticks from the first frame.

    It is the video's own clock, except that no gap takes longer than one step of the clip: the frames before
    and after it are neighbours there.
    """
    intervals, interval = np.diff(times), usual_interval(times)
    longest = np.where(_gaps(intervals), frame_step, max(frame_step, _LONGEST_REGULAR)) * interval
    return np.concatenate([[0.0], np.cumsum(np.minimum(intervals, longest))]), interval


def rate_and_duration(
    times: Sequence[int | None], tick_s: Fraction | None, stated_rate: Fraction | None, stated_s: float
) -> tuple[float, float]:
    """(mean frames a second, seconds) of a video: from the first time to the last and one more usual
    interval, where its frames have times in order; else what the file states. Raises BadVideoError where
    nothing tells.

    A stated rate counts where it says the same as the times, since those are rounded to ticks.
    """
    num_frames, known = len(times), np.array([time for time in times if time is not None], np.int64)
    if tick_s and len(known) == num_frames > 1 and (np.diff(known) > 0).all():
        span = int(known[-1] - known[0])
        if stated_rate and abs((num_frames - 1) / stated_rate / tick_s - span) <= 1:
            return float(stated_rate), float(num_frames / stated_rate)
        duration_s = (span + usual_interval(known)) * float(tick_s)
        return num_frames / duration_s, duration_s
    if stated_rate:
        return float(stated_rate), float(num_frames / stated_rate)
    if stated_s > 0:
        return num_frames / stated_s, stated_s
    if num_frames == 1:
        return 1.0, 1.0
    raise BadVideoError(
        "it states neither a frame rate nor a duration, and its frames have no times in order"
    )


def _gaps(intervals: np.ndarray) -> np.ndarray:
    """Mask of the intervals that are no usual ones."""
    median = np.sort(intervals)[(len(intervals) - 1) // 2]
    return intervals > _LONGEST_REGULAR * median
