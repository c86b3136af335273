"""Encoded video -> frames."""

import functools
import importlib.util
import io
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.container
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from jaxtyping import Int64, UInt8

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.clock import rate_and_duration
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.packets import Packets
from salt_distill.common.data.rgb import CONVERTIBLE_MATRICES, displayed_size, to_rgb
from salt_distill.common.data.stills import decode_stills, probe_stills, stills_in
from salt_distill.common.data.transport import require_all_packets
from salt_distill.common.data.video_facts import VideoFacts

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset([
    ".mp4", ".m4v", ".mov", ".qt", ".webm", ".mkv", ".avi", ".divx", ".gif", ".mpg", ".mpeg", ".m1v", ".m2v",
    ".mpv", ".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".3gp", ".3g2", ".mxf",
    ".mjpeg", ".mjpg", ".rm", ".rmvb", ".dv", ".y4m", ".nut", ".ivf", ".h264", ".264", ".hevc", ".h265",
    ".265",
])  # fmt: skip
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
def open_video(data: bytes, num_frames: int | None, *, seekable: bool | None = None) -> Iterator[Video]:
    """The video in these bytes, of which ``probe`` counted ``num_frames`` and told whether it is ``seekable``
    (None: not known). Raises BadVideoError.

    Frame i is the one that the decoder gives i-th. Where the times of the packets lead to the counted frames
    in that order, frames are found by them, and decoded without most of what lies before and between them;
    where they do not, PyAV decodes from the start and counts. Where nobody has told, all is decoded once to
    find out. `docs/decoding.md`."""
    images = stills_in(data)
    if images is not None:
        yield Video(times=None, frames=lambda frame_idx: list(decode_stills(images, frame_idx)))
        return
    with _open(data) as (container, stream):
        packets = Packets(stream, _demuxed(container, stream), num_frames)
        if packets.times is not None and not (
            _leads_to_the_frames(data, packets) if seekable is None else seekable
        ):
            packets.times = None
        if packets.times is not None and _torchcodec() and _torchcodec_agrees(stream, packets):
            frames = functools.partial(_decode_torchcodec, data, stream, packets)
        else:
            frames = functools.partial(_decode_pyav, data, stream, packets)
        yield Video(times=packets.times, frames=frames)


def decode(
    data: bytes, frame_idx: Sequence[int], num_frames: int | None = None, *, seekable: bool | None = None
) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames asked for, RGB, upright, in the order asked for; ``num_frames`` and ``seekable`` as in
    ``open_video``. Raises BadVideoError."""
    with open_video(data, num_frames, seekable=seekable) as video:
        return np.stack(video.frames(frame_idx))


def probe(data: bytes) -> VideoFacts:
    """Facts of a video, from decoding all of it (by PyAV, whose errors are strict). Raises BadVideoError
    unless every frame decodes, can be made RGB, and nothing of it was lost."""
    images = stills_in(data)
    if images is not None:
        return probe_stills(images)
    with _open(data) as (container, stream):
        if stream.codec.intra_only:  # a frame that stands alone has no excuse for what its decoder objects to
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        packets = list(_demuxed(container, stream))
        require_all_packets(data, container.format.name, stream.id, packets)
        times: list[int | None] = []
        height = width = 0
        kinds = set()
        for frame in _decoded(stream, packets):
            times.append(frame.pts)
            height, width = displayed_size(frame)
            kind = (frame.format.name, frame.colorspace, frame.color_range)
            if kind not in kinds:
                kinds.add(kind)
                to_rgb(frame, VideoReformatter())
        if not times:
            raise BadVideoError("no frame of its video stream can be decoded")
        stated_s = (
            float(stream.duration * stream.time_base)
            if stream.duration and stream.time_base
            else (container.duration or 0) / av.time_base
        )
        fps, duration_s = rate_and_duration(times, stream.time_base, stream.average_rate, stated_s)
        known = Packets(stream, packets, len(times)).times
        return VideoFacts(
            num_frames=len(times),
            fps=fps,
            width=width,
            height=height,
            duration_s=duration_s,
            codec=stream.codec.canonical_name,
            seekable=known is not None and known.tolist() == times,
        )


def upright_frames(data: bytes) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Every frame, RGB, upright, one at a time. Raises BadVideoError, also in the middle."""
    return (frame for frame, _ in timed_frames(data))


def timed_frames(data: bytes) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], Fraction | None]]:
    """Every frame as in ``upright_frames``, and its time in seconds where it has one."""
    images = stills_in(data)
    if images is not None:
        yield from ((decode_stills(images, [number])[0], None) for number in range(len(images)))
        return
    with _open(data) as (container, stream):
        reformatter = VideoReformatter()
        for frame in _decoded(stream, _demuxed(container, stream)):
            time_s = None if frame.pts is None or not stream.time_base else frame.pts * stream.time_base
            yield to_rgb(frame, reformatter), time_s


# --- PyAV ---


@contextmanager
def _open(data: bytes) -> Iterator[tuple[av.container.InputContainer, Any]]:
    """The container and its best video stream."""
    if not data:
        raise BadVideoError("the file is empty")
    with _container(data) as container:
        stream = _best_stream(data, container)
        if stream.codec_context is None:
            raise BadVideoError("no decoder for its video stream is installed")
        stream.codec_context.thread_count = 1
        yield container, stream


def _container(data: bytes) -> av.container.InputContainer:
    try:
        # A playlist must not make us open other files or addresses: no protocol is allowed.
        return av.open(
            io.BytesIO(data), "r", metadata_errors="ignore", options={"protocol_whitelist": "none"}
        )
    except FFmpegError as error:
        raise BadVideoError(f"it is no video that FFmpeg can open ({_reason(error)})") from error


def _best_stream(data: bytes, container: av.container.InputContainer) -> Any:
    """The best video stream as FFmpeg ranks them, but no picture beside a video: a cover or a preview."""
    stream = container.streams.best("video")
    if stream is None:
        raise BadVideoError("it has no video stream")
    if len(container.streams.video) > 1:
        with _container(data) as again:
            num_packets = Counter(packet.stream_index for packet in _demuxed(again, again.streams.video))
        if num_packets[stream.index] < 2:
            moving = [other for other in container.streams.video if num_packets[other.index] > 1]
            return max(moving, key=lambda other: other.width * other.height, default=stream)
    return stream


def _demuxed(container: av.container.InputContainer, stream: Any) -> Iterator[av.Packet]:
    """The packets of a stream or several, without the empty ones that PyAV adds."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except FFmpegError as error:
        raise BadVideoError(f"its packets cannot be read to the end ({_reason(error)})") from error


def _decoded(stream: Any, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    """The frames in packets as the decoder gives them, all of one size, none damaged."""
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


def _decode_pyav(data: bytes, stream: Any, packets: Packets, frame_idx: Sequence[int]) -> Frames:
    if packets.times is not None and max(frame_idx) < len(packets.times):
        times = packets.times[list(frame_idx)].tolist()
        try:
            with _fresh(data, stream) as fresh:
                frames = _decoded(fresh, packets.needed(set(times)))
                return _pick(((frame.pts, frame) for frame in frames), times)
        except BadVideoError as error:
            logger.info(
                "decoding a %s video from its start, since decoding only a part of it failed (%s)",
                stream.codec.canonical_name,
                error,
            )
    with _fresh(data, stream) as fresh:
        return _pick(enumerate(_decoded(fresh, packets)), frame_idx)


@contextmanager
def _fresh(data: bytes, stream: Any) -> Iterator[Any]:
    """A stream whose decoder has decoded nothing: this one, or the same once more, since parameter sets that
    a decoder met stay with it."""
    if not stream.codec_context.is_open:
        yield stream
        return
    with _open(data) as (_, again):
        yield again


def _pick(named: Iterable[tuple[int | None, av.VideoFrame]], names: Sequence[int]) -> Frames:
    """The frames of these names. One reformatter serves them all, and one thread: fresh ones cost more than
    the decoding of a small clip."""
    reformatter, wanted = VideoReformatter(), set(names)
    picked: dict[int, np.ndarray] = {}
    for name, frame in named:
        if name in wanted:
            picked[name] = to_rgb(frame, reformatter)
            if len(picked) == len(wanted):
                return [picked[name] for name in names]
    raise BadVideoError(f"frame {max(wanted)} was asked for, but it has fewer frames")


def _leads_to_the_frames(data: bytes, packets: Packets) -> bool:
    """Whether the decoder gives frames at the times of the packets, in their order. Of a damaged video nobody
    knows, so it does not: it is read from its start, up to the damage."""
    assert packets.times is not None
    try:
        with _open(data) as (_, stream):
            times = [frame.pts for frame in _decoded(stream, packets)]
    except BadVideoError:
        return False
    return bool(times) and times == packets.times[: len(times)].tolist()


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
    known_matrix = context.colorspace in CONVERTIBLE_MATRICES
    eight_bits = context.format is not None and all(
        component.bits <= 8 for component in context.format.components
    )
    return progressive and known_matrix and eight_bits and packets.starts_afresh_at_key_frames()


def _decode_torchcodec(data: bytes, stream: Any, packets: Packets, frame_idx: Sequence[int]) -> Frames:
    """Frames whose times are the ones asked for; where torchcodec finds others or none, PyAV's."""
    assert packets.times is not None, "torchcodec finds frames by their times"
    tick_s = float(stream.time_base)
    try:
        decoder = _torchcodec()(data, stream_index=stream.index, dimension_order="NHWC", num_ffmpeg_threads=1)
        batch = decoder.get_frames_at(list(frame_idx))
        times = batch.pts_seconds.numpy() / tick_s
        if np.abs(times - packets.times[list(frame_idx)]).max() < 0.5:
            return list(batch.data.numpy())
        reason = "it finds other frames"
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[-1]
    logger.info(
        "decoding a %s video with PyAV, since torchcodec failed (%s)", stream.codec.canonical_name, reason
    )
    return _decode_pyav(data, stream, packets, frame_idx)
