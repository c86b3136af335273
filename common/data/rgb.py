"""A decoded frame -> RGB, upright."""

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

from salt_distill.common.clip import BadVideoError

_BT2020_CONSTANT, _BT2020, _UNSPECIFIED = 10, 9, 2
CONVERTIBLE_MATRICES = frozenset([0, 1, 2, 4, 5, 6, 7, 9])
"""Colour matrices (ITU-T H.273) that FFmpeg's newest conversion knows."""


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> UInt8[np.ndarray, "h w 3"]:
    """A view of the frame's own memory. Raises BadVideoError where FFmpeg cannot convert it.

    Other colour matrices than the known ones are taken as FFmpeg's tools have always taken them: BT.2020 with
    constant luminance as BT.2020, all others as if nothing was stated.
    """
    if frame.colorspace not in CONVERTIBLE_MATRICES:
        frame.colorspace = _BT2020 if frame.colorspace == _BT2020_CONSTANT else _UNSPECIFIED
    try:
        picture = reformatter.reformat(frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
    except FFmpegError as error:
        raise BadVideoError(
            f"its frames (pixels {frame.format.name}, colour matrix {int(frame.colorspace)}) cannot be made"
            f" RGB ({error.strerror or type(error).__name__})"
        ) from error
    plane, shape = picture.planes[0], (picture.height, picture.width, 3)
    image = np.ndarray(shape, np.uint8, buffer=memoryview(plane), strides=(plane.line_size, 3, 1))
    transpose, mirror_x, mirror_y = _orientation(frame)
    if transpose:
        image = image.transpose(1, 0, 2)
    return image[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]


def displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(height, width)"""
    return (frame.width, frame.height) if _orientation(frame)[0] else (frame.height, frame.width)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then mirror x, then mirror y) that make a frame upright, from the display matrix, which
    PyAV leaves to us.

    The matrix sends (x, y) to (a x + c y, b x + d y); angles between the right ones are taken to the nearest.
    """
    side_data = frame.side_data.get(SideData.DISPLAYMATRIX)  # pyright: ignore[reportCallIssue, reportArgumentType]  (its stub says str)
    if side_data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].tolist()
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)
