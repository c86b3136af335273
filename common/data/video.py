"""Encoded video -> frames."""

import functools
import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import av.container
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from common.data.encode import encode_mp4
from common.data.facts import BadVideoError, VideoFacts
from common.data.stills import decode_stills, probe_stills, stills_in

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp"]
)
"""Names that are taken for videos, in lower case; the content decides whether they are."""


def decoder_name() -> str:
    """The decoder of this process: torchcodec where it works, else PyAV.

    Both give the same pixels for 8-bit 4:2:0 video of even size; for 10 bits or odd sizes their colour conversions differ.
    """
    return f"torchcodec {importlib.import_module('torchcodec').__version__}" if _torchcodec() else f"pyav {av.__version__}"


def decode(data: bytes, frame_idx: Sequence[int]) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames asked for, RGB, upright, in the order asked for. Raises BadVideoError where one of them cannot be had."""
    images = stills_in(data)
    if images is not None:
        return decode_stills(images, frame_idx)
    return _decode_torchcodec(data, frame_idx) if _torchcodec() else _decode_pyav(data, frame_idx)


def probe(data: bytes) -> VideoFacts:
    """Facts of a video, from decoding all of it (by PyAV, whose errors are strict). Raises BadVideoError unless every frame decodes."""
    images = stills_in(data)
    if images is not None:
        return probe_stills(images)
    with _open(data) as (container, stream):
        num_frames = 0
        height = width = 0
        for frame in _frames(container, stream):
            num_frames += 1
            height, width = _displayed_size(frame)
        if not num_frames:
            raise BadVideoError("no frame of its video stream can be decoded")
        duration_s = (
            float(stream.duration * stream.time_base) if stream.duration and stream.time_base else (container.duration or 0) / av.time_base
        )
        fps = float(stream.average_rate or 0) or (num_frames / duration_s if duration_s else 0)
        if not fps:
            raise BadVideoError("it states neither a frame rate nor a duration")
        return VideoFacts(
            num_frames=num_frames,
            fps=fps,
            width=width,
            height=height,
            duration_s=duration_s or num_frames / fps,
            codec=stream.codec.canonical_name,
        )


def upright_frames(data: bytes) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Every frame, RGB, upright, one at a time. Raises BadVideoError, also in the middle."""
    images = stills_in(data)
    if images is not None:
        yield from (decode_stills(images, [number])[0] for number in range(len(images)))
        return
    with _open(data) as (container, stream):
        reformatter = VideoReformatter()
        for frame in _frames(container, stream):
            yield _to_rgb(frame, reformatter)


# --- PyAV ---


@contextmanager
def _open(data: bytes) -> Iterator[tuple[av.container.InputContainer, Any]]:
    """The container and its best video stream, as FFmpeg ranks them."""
    if not data:
        raise BadVideoError("the file is empty")
    try:
        # A playlist must not make us open other files or addresses: no protocol is allowed.
        with av.open(io.BytesIO(data), "r", metadata_errors="ignore", options={"protocol_whitelist": "none"}) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise BadVideoError("it has no video stream")
            if stream.codec_context is None:
                raise BadVideoError("no decoder for its video stream is installed")
            stream.codec_context.thread_count = 1
            yield container, stream
    except FFmpegError as error:
        raise BadVideoError(f"it is no video that FFmpeg can open ({_reason(error)})") from error


def _frames(container: av.container.InputContainer, stream: Any) -> Iterator[av.VideoFrame]:
    """The frames of a stream in display order, all of one size, none damaged."""
    size = None
    num_frames = 0
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise BadVideoError(f"frame {num_frames} is damaged")
            if size not in (None, (frame.width, frame.height)):
                raise BadVideoError(f"frame {num_frames} has another size than the frames before it")
            size = (frame.width, frame.height)
            num_frames += 1
            yield frame
    except FFmpegError as error:
        raise BadVideoError(f"decoding fails after {num_frames} frames ({_reason(error)})") from error


def _decode_pyav(data: bytes, frame_idx: Sequence[int]) -> np.ndarray:
    # One reformatter for the whole video, and one thread: a fresh one for every frame costs 5 to 10 times the decoding of a small clip.
    reformatter = VideoReformatter()
    wanted, last = set(frame_idx), max(frame_idx)
    decoded = {}
    with _open(data) as (container, stream):
        for number, frame in enumerate(_frames(container, stream)):
            if number in wanted:
                decoded[number] = _to_rgb(frame, reformatter)
            if number == last:
                break
        else:
            raise BadVideoError(f"frame {last} was asked for, but it has fewer frames")
    return np.stack([decoded[i] for i in frame_idx])


def _to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    image = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    transpose, mirror_x, mirror_y = _orientation(frame)
    if transpose:
        image = image.transpose(1, 0, 2)
    return image[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]


def _displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(height, width)"""
    return (frame.width, frame.height) if _orientation(frame)[0] else (frame.height, frame.width)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then mirror x, then mirror y) that make a frame upright, from the display matrix, which PyAV leaves to us.

    The matrix sends (x, y) to (a x + c y, b x + d y); angles between the right ones are taken to the nearest.
    """
    side_data = frame.side_data.get(SideData.DISPLAYMATRIX)  # pyright: ignore[reportCallIssue, reportArgumentType]  (its stub says str)
    if side_data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].tolist()
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _reason(error: FFmpegError) -> str:
    return error.strerror or type(error).__name__


# --- torchcodec ---


@functools.cache
def _torchcodec() -> Any:
    """torchcodec's decoder class, or None where it is not installed or cannot load FFmpeg's shared libraries."""
    if importlib.util.find_spec("torchcodec") is None:
        return None
    black = [av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24") for _ in range(2)]
    sample = encode_mp4(black, width=16, height=16, fps=1, crf=23)
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

        VideoDecoder(sample).get_frames_at([1])
    except (ImportError, OSError, RuntimeError) as error:  # torchcodec says RuntimeError for libraries it cannot load
        logger.info("torchcodec does not work here, so PyAV decodes: %s", str(error).splitlines()[0])
        return None
    return VideoDecoder


def _decode_torchcodec(data: bytes, frame_idx: Sequence[int]) -> np.ndarray:
    if not data:
        raise BadVideoError("the file is empty")
    try:
        decoder = _torchcodec()(data, dimension_order="NHWC", num_ffmpeg_threads=1)
        return decoder.get_frames_at(list(frame_idx)).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise BadVideoError(f"torchcodec cannot decode it ({str(error).strip().splitlines()[-1]})") from error
