"""Encoded video -> frames."""

import functools
import importlib.util
import io
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import av.container
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Int64, UInt8

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.facts import VideoFacts
from salt_distill.common.data.packets import Packets
from salt_distill.common.data.stills import decode_stills, probe_stills, stills_in

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".webm",
        ".mkv",
        ".avi",
        ".gif",
        ".mpg",
        ".mpeg",
        ".ts",
        ".wmv",
        ".flv",
        ".ogv",
        ".3gp",
    ]
)
"""Names that are taken for videos, in lower case; the content decides whether they are."""
Frames = list[UInt8[np.ndarray, "h w 3"]]
"""RGB, upright, all of one size."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """An open video. ``open_video`` makes one."""

    times: Int64[np.ndarray, " n"] | None
    """When each frame is shown, in ticks of some length. None where the file does not tell: only the frames'
    order is known then."""
    frames: Callable[[Sequence[int]], Frames]
    """The frames asked for, in the order asked for. Raises BadVideoError where one of them cannot be had."""


def decoder_name() -> str:
    """The decoder of this process: torchcodec where it works, else PyAV. `docs/decoding.md` says how far
    their pixels agree."""
    return (
        f"torchcodec {importlib.import_module('torchcodec').__version__}"
        if _torchcodec()
        else f"pyav {av.__version__}"
    )


@contextmanager
def open_video(data: bytes, num_frames: int | None) -> Iterator[Video]:
    """The video in these bytes, of which ``probe`` counted ``num_frames`` (None: not known). Raises
    BadVideoError.

    Frame i is the one shown i-th. Where the packets state a time for each of the counted frames, frames are
    found by their times, and decoded without most of what lies before and between them; where they do not,
    PyAV decodes from the start and counts. `docs/decoding.md`.
    """
    images = stills_in(data)
    if images is not None:
        yield Video(times=None, frames=lambda frame_idx: list(decode_stills(images, frame_idx)))
        return
    with _open(data) as (container, stream):
        packets = Packets(stream, _demuxed(container, stream), num_frames)
        if packets.times is not None and _torchcodec() and _torchcodec_agrees(stream, packets):
            frames = functools.partial(_decode_torchcodec, data, stream, packets)
        else:
            frames = functools.partial(_decode_pyav, stream, packets)
        yield Video(times=packets.times, frames=frames)


def decode(
    data: bytes, frame_idx: Sequence[int], num_frames: int | None = None
) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames asked for, RGB, upright, in the order asked for; ``num_frames`` as in ``open_video``. Raises
    BadVideoError."""
    with open_video(data, num_frames) as video:
        return np.stack(video.frames(frame_idx))


def probe(data: bytes) -> VideoFacts:
    """Facts of a video, from decoding all of it (by PyAV, whose errors are strict). Raises BadVideoError
    unless every frame decodes."""
    images = stills_in(data)
    if images is not None:
        return probe_stills(images)
    with _open(data) as (container, stream):
        num_frames = 0
        height = width = 0
        for frame in _decoded(stream, _demuxed(container, stream)):
            num_frames += 1
            height, width = _displayed_size(frame)
        if not num_frames:
            raise BadVideoError("no frame of its video stream can be decoded")
        duration_s = (
            float(stream.duration * stream.time_base)
            if stream.duration and stream.time_base
            else (container.duration or 0) / av.time_base
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
        for frame in _decoded(stream, _demuxed(container, stream)):
            yield _to_rgb(frame, reformatter)


# --- PyAV ---


@contextmanager
def _open(data: bytes) -> Iterator[tuple[av.container.InputContainer, Any]]:
    """The container and its best video stream, as FFmpeg ranks them."""
    if not data:
        raise BadVideoError("the file is empty")
    try:
        # A playlist must not make us open other files or addresses: no protocol is allowed.
        with av.open(
            io.BytesIO(data), "r", metadata_errors="ignore", options={"protocol_whitelist": "none"}
        ) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise BadVideoError("it has no video stream")
            if stream.codec_context is None:
                raise BadVideoError("no decoder for its video stream is installed")
            stream.codec_context.thread_count = 1
            yield container, stream
    except FFmpegError as error:
        raise BadVideoError(f"it is no video that FFmpeg can open ({_reason(error)})") from error


def _demuxed(container: av.container.InputContainer, stream: Any) -> Iterator[av.Packet]:
    """The packets of a stream, without the empty one that PyAV adds."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except FFmpegError as error:
        raise BadVideoError(f"its packets cannot be read to the end ({_reason(error)})") from error


def _decoded(stream: Any, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    """The frames in packets in display order, all of one size, none damaged."""
    size = None
    num_frames = 0
    try:
        for packet in itertools.chain(packets, [None]):  # None: give out what is held back
            for frame in stream.codec_context.decode(packet):
                if frame.is_corrupt:
                    raise BadVideoError(f"frame {num_frames} is damaged")
                if size not in (None, (frame.width, frame.height)):
                    raise BadVideoError(f"frame {num_frames} has another size than the frames before it")
                size = (frame.width, frame.height)
                num_frames += 1
                yield frame
    except FFmpegError as error:
        raise BadVideoError(f"decoding fails after {num_frames} frames ({_reason(error)})") from error


def _decode_pyav(stream: Any, packets: Packets, frame_idx: Sequence[int]) -> Frames:
    if packets.times is not None and max(frame_idx) < len(packets.times):
        times = packets.times[list(frame_idx)].tolist()
        try:
            return _pick(
                ((frame.pts, frame) for frame in _decoded(stream, packets.needed(set(times)))), times
            )
        except BadVideoError as error:
            logger.info(
                "decoding a %s video from its start, since only a part of it did not do (%s)",
                stream.codec.canonical_name,
                error,
            )
        stream.codec_context.flush_buffers()
    return _pick(enumerate(_decoded(stream, packets)), frame_idx)


def _pick(named: Iterable[tuple[int | None, av.VideoFrame]], names: Sequence[int]) -> Frames:
    """The frames of these names. One reformatter serves them all, and one thread: fresh ones cost more than
    the decoding of a small clip."""
    reformatter, wanted = VideoReformatter(), set(names)
    picked: dict[int, np.ndarray] = {}
    for name, frame in named:
        if name in wanted:
            picked[name] = _to_rgb(frame, reformatter)
            if len(picked) == len(wanted):
                return [picked[name] for name in names]
    raise BadVideoError(f"frame {max(wanted)} was asked for, but it has fewer frames")


def _to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> UInt8[np.ndarray, "h w 3"]:
    """A view of the frame's own memory."""
    shown = reformatter.reformat(frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
    plane = shown.planes[0]
    image = np.ndarray(
        (shown.height, shown.width, 3), np.uint8, buffer=memoryview(plane), strides=(plane.line_size, 3, 1)
    )
    transpose, mirror_x, mirror_y = _orientation(frame)
    if transpose:
        image = image.transpose(1, 0, 2)
    return image[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]


def _displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
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


def _reason(error: FFmpegError) -> str:
    return error.strerror or type(error).__name__


# --- torchcodec ---


@functools.cache
def _torchcodec() -> Any:
    """torchcodec's decoder class, or None where it is not installed or cannot load FFmpeg's shared
    libraries."""
    if importlib.util.find_spec("torchcodec") is None:
        return None
    black = [av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24") for _ in range(2)]
    sample = encode_mp4(black, width=16, height=16, fps=1, crf=23)
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

        VideoDecoder(sample).get_frames_at([1])
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # torchcodec says RuntimeError for libraries it cannot load
        logger.info("torchcodec does not work here, so PyAV decodes: %s", str(error).splitlines()[0])
        return None
    return VideoDecoder


def _torchcodec_agrees(stream: Any, packets: Packets) -> bool:
    """Whether torchcodec gives PyAV's pixels.

    It starts at any key frame, takes the two fields of an interlaced frame for one, and where colours of more
    than 8 bits are stored at half the resolution, the two place them differently.
    """
    context = stream.codec_context
    progressive = context.field_order <= 1  # 0: not known, 1: progressive
    eight_bits = context.format is not None and all(
        component.bits <= 8 for component in context.format.components
    )
    return progressive and eight_bits and packets.starts_afresh_at_key_frames()


def _decode_torchcodec(data: bytes, stream: Any, packets: Packets, frame_idx: Sequence[int]) -> Frames:
    """Frames whose times are the ones asked for; where torchcodec finds others or none, PyAV's."""
    assert packets.times is not None, "torchcodec finds frames by their times"
    tick_s = float(stream.time_base)
    try:
        decoder = _torchcodec()(data, stream_index=stream.index, dimension_order="NHWC", num_ffmpeg_threads=1)
        batch = decoder.get_frames_at(list(frame_idx))
        found = batch.pts_seconds.numpy() / tick_s
        if np.abs(found - packets.times[list(frame_idx)]).max() < 0.5:
            return list(batch.data.numpy())
        reason = "it finds other frames"
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[-1]
    logger.info(
        "decoding a %s video with PyAV, since torchcodec did not do (%s)", stream.codec.canonical_name, reason
    )
    return _decode_pyav(stream, packets, frame_idx)
