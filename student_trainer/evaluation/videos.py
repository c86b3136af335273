"""Videos to be embedded or named: files of a folder, or those of a packed data set. They need no packing and
no labels."""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salt_distill.common.config.embed import VideosConfig
from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.reader import require_sha256
from salt_distill.common.data.scan import probe_place
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.tasks import Clip, Decoder, Task
from salt_distill.common.data.video import VIDEO_SUFFIXES, decoder_name
from salt_distill.common.data.video_facts import VideoFacts
from salt_distill.common.folders.slice import Slice


@dataclass(frozen=True, kw_only=True)
class FoundVideo:
    """A video that can be decoded."""

    name: str
    encoded: Slice | bytes
    num_frames: int
    fps: float
    """Mean frames per second."""
    seekable: bool | None
    """As in ``VideoFacts``."""


@dataclass(frozen=True, kw_only=True)
class VideoSet:
    """Videos by number. ``open_videos`` makes one."""

    names: Sequence[str]
    """Paths relative to the folder; keys of a packed data set."""
    identity: str
    """sha256 of names and sizes, or the data set's index hash: which videos these are."""
    find: Callable[[int], FoundVideo]
    """Raises BadVideoError."""
    decode: Callable[[FoundVideo, Any], Future[Clip]]
    """What a cut takes of a video. The result raises BadVideoError."""

    def ahead(self, numbers: Sequence[int], look: int = 2) -> Iterator[tuple[int, Future[FoundVideo]]]:
        """Each video in turn, while the next ones are looked into."""
        with ThreadPoolExecutor(look, thread_name_prefix="find-ahead") as threads:
            pending = [(number, threads.submit(self.find, number)) for number in numbers[:look]]
            for position in range(len(numbers)):
                yield pending.pop(0)
                if position + look < len(numbers):
                    number = numbers[position + look]
                    pending.append((number, threads.submit(self.find, number)))


@contextmanager
def open_videos(source: str, loader: VideosConfig) -> Iterator[VideoSet]:
    """The videos of a file, of a folder or of a packed data set. Raises ValueError where there are none."""
    timeout_s, processes = loader.decode_timeout_s, loader.decode_processes
    decoder = DecodePool(processes, timeout_s=timeout_s, call=Decoder(decoder_name()))
    prober = DecodePool(processes, timeout_s=timeout_s, call=probe_place)

    def decode(video: FoundVideo, cut: Any) -> Future[Clip]:
        return decoder.submit(Task(video.encoded, video.num_frames, cut, video.seekable))

    try:
        if "://" in source or _is_packed(Path(source)):
            yield _packed(source, decode)
        else:
            yield _files(Path(source), prober, decode)
    finally:
        decoder.close()
        prober.close()


def _is_packed(path: Path) -> bool:
    return path.is_dir() and ((path / "dataset.json").is_file() or any(path.glob("*.tar")))


def _packed(source: str, decode: Callable[[FoundVideo, Any], Future[Clip]]) -> VideoSet:
    dataset = open_dataset(source)
    samples = [sample for shard in dataset.samples("all") for sample in shard]

    def find(number: int) -> FoundVideo:
        sample = samples[number]
        encoded = dataset.encoded(sample)
        if isinstance(encoded, bytes):
            require_sha256(encoded, sample)
        return FoundVideo(
            name=sample.key,
            encoded=encoded,
            num_frames=sample.num_frames,
            fps=sample.fps,
            seekable=sample.seekable,
        )

    names = [sample.key for sample in samples]
    return VideoSet(names=names, identity=dataset.index_hash, find=find, decode=decode)


def _files(path: Path, prober: DecodePool, decode: Callable[[FoundVideo, Any], Future[Clip]]) -> VideoSet:
    folder = path if path.is_dir() else path.parent
    paths = (
        sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in VIDEO_SUFFIXES)
        if path.is_dir()
        else [path]
    )
    if not paths or not paths[0].is_file():
        raise ValueError(
            f"got {path}, expected a video, a folder of videos, or a packed data set: there is none"
            f" (names that end in {', '.join(sorted(VIDEO_SUFFIXES))})"
        )
    names = [str(file.relative_to(folder)) for file in paths]

    def find(number: int) -> FoundVideo:
        place = Slice(str(paths[number]), 0, paths[number].stat().st_size)
        facts: VideoFacts
        _, facts = prober.submit((place.path, 0, place.size, paths[number].suffix.lower())).result()
        return FoundVideo(
            name=names[number],
            encoded=place,
            num_frames=facts.num_frames,
            fps=facts.fps,
            seekable=facts.seekable,
        )

    sizes = [file.stat().st_size for file in paths]
    identity = hashlib.sha256(repr(list(zip(names, sizes, strict=True))).encode("utf-8", "surrogateescape"))
    return VideoSet(names=names, identity=identity.hexdigest(), find=find, decode=decode)


def report_skipped(skipped: dict[str, str], num_videos: int, max_bad_fraction: float) -> None:
    """Names the videos that could not be read. Raises ValueError where that is all of them, or too many."""
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if num_videos and len(skipped) == num_videos:
        raise ValueError(f"got {num_videos} videos of which none can be decoded, expected some")
    if len(skipped) > max_bad_fraction * num_videos:
        raise ValueError(
            f"got {len(skipped)} videos that cannot be decoded among {num_videos}, expected at most a share"
            f" of loader.max_bad_fraction={max_bad_fraction:g}: look at the reasons above, or raise it"
        )
