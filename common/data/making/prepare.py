"""One source -> what goes into a tar: its bytes and its facts, or why not. Runs in worker processes."""

import contextlib
import os
import stat
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import PackConfig
from salt_distill.common.data.encode import FAST_DECODING, encode_mp4
from salt_distill.common.data.making.frame_folder import frame_names
from salt_distill.common.data.making.sources import is_of_the_kernel
from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.stills import (
    IMAGE_SUFFIXES,
    content_hash,
    decode_stills,
    probe_stills,
    shrink_still,
    stills_in,
)
from salt_distill.common.data.usable import MIN_SIDE, require_usable
from salt_distill.common.data.video import VIDEO_SUFFIXES, probe, timed_frames
from salt_distill.common.data.video_facts import VideoFacts

_REENCODE_CRF = 18
_TICK_S = Fraction(1, 1_000_000)
"""Of the clock of smaller copies."""
_READ_AHEAD = 64
_READ_AHEAD_BYTES = 500_000_000
"""What workers have read and the tar does not hold yet: its order is fixed, so one long video holds back
those after it."""
_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
_SUFFIX_OF = {"mpo": ".jpg", "jpeg": ".jpg"}


@dataclass(frozen=True, kw_only=True)
class PackingJob:
    """A source, and the options that change what is made of it."""

    path: Path
    short_side: int | None
    copies: str
    """``fast`` or ``small``, as in PackConfig."""
    max_video_bytes: int
    fps: float | None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sample as it goes into a tar."""

    members: list[tuple[str, bytes]]
    """(suffix, content)."""
    facts: VideoFacts
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Of the members' contents."""
        return sum(len(content) for _, content in self.members)


def prepare_all(paths: Sequence[Path], config: PackConfig) -> Generator[Prepared | BadVideoError, None, None]:
    """``prepare`` of each path, in order; a bounded number of bytes ahead of the one that is written."""
    jobs = (
        PackingJob(
            path=path,
            short_side=config.short_side,
            copies=config.copies,
            max_video_bytes=config.max_video_bytes,
            fps=config.fps,
        )
        for path in paths
    )
    with contextlib.closing(
        DecodePool(config.workers or os.cpu_count() or 1, timeout_s=config.timeout_s, call=prepare)
    ) as pool:
        ahead: deque[Future[Prepared]] = deque()
        for job in jobs:
            ahead.append(pool.submit(job))
            while len(ahead) == _READ_AHEAD or _bytes_in(ahead) > _READ_AHEAD_BYTES:
                yield _result(ahead.popleft())
        while ahead:
            yield _result(ahead.popleft())


def _result(future: Future[Prepared]) -> Prepared | BadVideoError:
    try:
        return future.result()
    except BadVideoError as error:
        return error


def _bytes_in(ahead: Iterable[Future[Prepared]]) -> int:
    return sum(future.result().num_bytes for future in ahead if future.done() and future.exception() is None)


def prepare(job: PackingJob) -> Prepared:
    """The sample that a file or a folder of frames becomes. Raises BadVideoError."""
    try:
        kind = stat.S_IFMT(os.stat(job.path).st_mode)
        prepared = _folder(job) if kind == stat.S_IFDIR else _file(job)
    except OSError as error:
        raise BadVideoError(error.strerror or str(error)) from error
    if job.short_side is None or min(prepared.facts.width, prepared.facts.height) <= job.short_side:
        return prepared
    return _shrunk(prepared, job.short_side, FAST_DECODING if job.copies == "fast" else {})


def _file(job: PackingJob) -> Prepared:
    data = read_file(job.path, job.max_video_bytes)
    suffix, images = job.path.suffix.lower(), stills_in(data)
    facts = probe(data)
    require_usable(facts, suffix, is_image=images is not None)
    if suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        suffix = (
            ".mp4" if images is None else _SUFFIX_OF.get(facts.codec, "." + facts.codec)
        )  # WebDataset needs one; decoders look inside
    return Prepared(members=[(suffix, data)], facts=facts, sha256=content_hash(images or [data]))


def _folder(job: PackingJob) -> Prepared:
    names = frame_names(os.listdir(job.path))
    if job.fps is None:
        raise BadVideoError("it is a folder of images, expected --fps for their rate")
    members: list[tuple[str, bytes]] = []
    room = job.max_video_bytes
    for place, name in enumerate(names):
        data = read_file(job.path / name, room)
        members.append((f".{place:06d}{Path(name).suffix.lower()}", data))
        room -= len(data)
    images = [memoryview(data) for _, data in members]
    facts = replace(probe_stills(images), fps=job.fps, duration_s=len(images) / job.fps)
    require_usable(facts, "", is_image=False)
    return Prepared(members=members, facts=facts, sha256=content_hash(images))


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file; opening a named pipe would wait for its other end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise BadVideoError(
            f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a folder')}, expected a regular file"
        )
    if is_of_the_kernel(path):
        raise BadVideoError(f"it is a link to {os.path.realpath(path)}, which is on no disk")
    if status.st_size > max_bytes:
        raise BadVideoError(f"it has more than the {max_bytes} bytes that --max-video-bytes allows")
    return path.read_bytes()


def _shrunk(prepared: Prepared, short_side: int, options: Mapping[str, str]) -> Prepared:
    """A smaller copy: a video or frame folder as an mp4 of every frame at its own time, an image as a
    JPEG."""
    facts, contents = prepared.facts, [content for _, content in prepared.members]
    images = [memoryview(content) for content in contents] if len(contents) > 1 else stills_in(contents[0])
    if images is not None and len(images) == 1:
        data = shrink_still(images[0], short_side)
        return Prepared(members=[(".jpg", data)], facts=probe(data), sha256=content_hash([data]))
    scale = short_side / min(facts.width, facts.height)
    width, height = (
        max(MIN_SIDE, 2 * round(side * scale / 2)) for side in (facts.width, facts.height)
    )  # even, as 4:2:0 needs them
    has_times = images is None and facts.seekable
    frames = (
        (_small(frame, time, width, height) for frame, time in timed_frames(contents[0]))
        if images is None
        else (_small(decode_stills(images, [i])[0], None, width, height) for i in range(len(images)))
    )
    data = encode_mp4(
        frames,
        width=width,
        height=height,
        fps=facts.fps,
        crf=_REENCODE_CRF,
        tick_s=_TICK_S if has_times else None,
        options=options,
    )
    copy = probe(data)
    if copy.num_frames != facts.num_frames:
        raise BadVideoError(
            f"its smaller copy has {copy.num_frames} of its {facts.num_frames} frames: pack it without"
            " --short-side"
        )
    return Prepared(members=[(".mp4", data)], facts=copy, sha256=content_hash([data]))


def _small(frame: np.ndarray, time_s: Fraction | None, width: int, height: int) -> av.VideoFrame:
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    image = image.reformat(width=width, height=height, interpolation="AREA")
    if time_s is not None:
        image.pts = round(time_s / _TICK_S)
    return image
