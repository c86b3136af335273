"""Labelled clips of anybody's videos, whose labels are made from the clips themselves: which way time runs,
how fast it plays, whether its halves are in order, and which video it is from."""

import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.progress import track

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import PackConfig, PretextConfig
from salt_distill.common.console import console, say
from salt_distill.common.csv_text import csv_text
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.making.prepare import read_file
from salt_distill.common.data.making.sources import list_sources
from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.skipped import FILE_NAME, write_skipped
from salt_distill.common.data.video import Frames, probe, upright_frames
from salt_distill.common.draws import uniforms, words
from salt_distill.common.whole import write_whole

ARROWS = ("forward", "backward")
SPEEDS = (1, 2)
ORDERS = ("kept", "exchanged")
KINDS = tuple(itertools.product(ARROWS, SPEEDS, ORDERS))
"""Of labelled clips."""
_OPPOSITES = (0, 7, 1, 6, 2, 5, 3, 4)
"""Positions in KINDS, as pairs that differ in all three labels. A bit of a position is a label: the exclusive
or with a number exchanges the classes of some labels, and keeps the pairs."""
COLUMNS = ("path", "split", "arrow", "speed", "order", "origin")
_LABELS = tuple(enumerate(COLUMNS))[2:]
CRF, PIX_FMT, FPS = 8, "yuv444p", 25
"""Of the written clips. High quality: what compression adds must not tell which way time ran."""
_WINDOWS_PER_CLIP = 3
"""Drawn for each clip: those in which nothing moves are left out."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A video, and the clips that it is to give."""

    config: PretextConfig
    path: Path
    name: str
    num_frames: int
    num_clips: dict[str, int]
    """By split."""
    start: dict[str, int]
    """By split, the position in KINDS that it starts at where it gives fewer clips than there are kinds."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Consecutive frames of a video, as many as its fastest clip takes, and a square of them."""

    first: int
    position: float
    """Where the square lies, from 0 (left or top) to 1."""
    length: int

    @property
    def frame_idx(self) -> range:
        return range(self.first, self.first + self.length)


def make_pretext(config: PretextConfig) -> None:
    """Writes ``SPLIT/VIDEO-NUMBER.mp4`` and ``labels.csv``; videos that give no clip are named in
    ``skipped.csv``.

    Raises ValueError for a folder in use, and where no video gives a clip.
    """
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"got OUT {out}, which is not empty, expected a new folder")
    listing = list_sources(PackConfig(src=config.src, out=config.out))
    skipped, usable, rows = list(listing.skipped), [], []
    videos = [(video.path, config) for video in listing.sources]
    for video, num_frames in zip(listing.sources, _answers(_num_frames, videos, config), strict=True):
        if isinstance(num_frames, BadVideoError):
            skipped.append((str(video.path), str(num_frames)))
        else:
            usable.append((video.path, video.name, num_frames))
    sources = list(_sources(config, usable))
    for source, written in zip(sources, _answers(_write_clips, sources, config), strict=True):
        if isinstance(written, BadVideoError):
            skipped.append((str(source.path), str(written)))
        else:
            rows += written
    for path, reason in skipped:
        say(f"skipped {path}: {reason}")
    if not rows:
        raise ValueError(
            f"none of the {len(skipped)} videos of {config.src} gives a clip, expected videos of at least"
            f" {_least_frames(config)} frames in which something moves"
        )
    write_skipped(out, skipped)
    write_whole(out / "labels.csv", csv_text([COLUMNS, *sorted(rows)]))
    splits, origins = Counter(row[1] for row in rows), {row[-1] for row in rows}
    named = f"; {len(skipped)} videos skipped (named in {out / FILE_NAME})" if skipped else ""
    counts = ", ".join(f"{count} {split}" for split, count in sorted(splits.items()))
    say(f"{out}: {len(rows)} clips ({counts}) of {len(origins)} videos{named}")
    for split in ("train", "test"):
        labelled = [row for row in rows if row[1] == split]
        alike = [label for place, label in _LABELS if len({row[place] for row in labelled}) < 2]
        if alike:
            say(
                f"{split}: {len(labelled)} clips with fewer than two classes of {', '.join(alike)}, which can"
                f" tell nothing of an encoder: give a larger --num-{split}, or more videos"
            )


def labelled_clip(frames: Frames, num_frames: int, arrow: str, speed: int, order: str) -> Frames:
    """``num_frames`` of the frames, every ``speed``-th one, backwards or not, the halves exchanged or not."""
    clip = frames[: num_frames * speed : speed]
    if arrow == "backward":
        clip = clip[::-1]
    half = num_frames // 2
    return clip[half:] + clip[:half] if order == "exchanged" else clip


def _answers(call: Callable[[Any], Any], items: Sequence[Any], config: PretextConfig) -> Iterator[Any]:
    """What ``call`` gives for each item, in order, or its BadVideoError."""
    with contextlib.closing(DecodePool(os.cpu_count() or 1, timeout_s=config.timeout_s, call=call)) as pool:
        futures = [pool.submit(item) for item in items]
        for future in track(futures, description="pretext", console=console, disable=not console.is_terminal):
            try:
                yield future.result()
            except BadVideoError as error:
                yield error


def _num_frames(video: tuple[Path, PretextConfig]) -> int:
    """Frames of a video. Raises BadVideoError where they are too few."""
    path, config = video
    num_frames, least = probe(_read(path, config)).num_frames, _least_frames(config)
    if num_frames < least:
        raise BadVideoError(f"it has {num_frames} frames, expected {least} or more")
    return num_frames


def _least_frames(config: PretextConfig) -> int:
    """Frames of the shortest video both of whose parts hold a window."""
    return math.ceil(_window_length(config) / min(config.test_share, 1 - config.test_share)) + 1


def _window_length(config: PretextConfig) -> int:
    return config.num_frames * max(SPEEDS)


def _read(path: Path, config: PretextConfig) -> bytes:
    try:
        return read_file(path, config.max_video_bytes)
    except OSError as error:
        raise BadVideoError(error.strerror or str(error)) from error


def _sources(config: PretextConfig, usable: Sequence[tuple[Path, str, int]]) -> Iterator[_Source]:
    """The clips shared out over the videos, as evenly as they go."""
    totals = {"pretrain": config.num_pretrain, "train": config.num_train, "test": config.num_test}
    num_clips = {
        split: [
            total * (number + 1) // len(usable) - total * number // len(usable)
            for number in range(len(usable))
        ]
        for split, total in totals.items()
    }
    names = [name for _, name, _ in usable]
    starts = {split: _starts(config.seed, split, names, counts) for split, counts in num_clips.items()}
    for number, (path, name, num_frames) in enumerate(usable):
        yield _Source(
            config=config,
            path=path,
            name=name,
            num_frames=num_frames,
            num_clips={split: counts[number] for split, counts in num_clips.items()},
            start={split: start[number] for split, start in starts.items()},
        )


def _starts(seed: int, split: str, names: Sequence[str], counts: Sequence[int]) -> list[int]:
    """For each video the position in KINDS that it starts at: each position for as many videos, also of those
    that give a clip more than others. Who gets which is drawn for each split, so that it follows neither from
    names nor from another split."""
    draws = [words(seed, f"pretext kinds {split} {name}", 0, 1)[0] for name in names]
    in_turn = sorted(range(len(names)), key=lambda number: (-counts[number], draws[number]))
    starts = [0] * len(names)
    for place, number in enumerate(in_turn):
        starts[number] = _OPPOSITES[place % len(KINDS)]
    return starts


def _kinds(num_clips: int, start: int) -> list[tuple[str, int, str]]:
    """Of a video's labelled clips: all in turn, or so many pairs of opposites."""
    if num_clips >= len(KINDS):
        return [KINDS[number % len(KINDS)] for number in range(num_clips)]
    return [KINDS[start ^ position] for position in _OPPOSITES[:num_clips]]


def _write_clips(source: _Source) -> list[tuple[str, ...]]:
    """The clips of one video, written; their rows of labels.csv. Raises BadVideoError."""
    config = source.config
    windows = _windows(source)
    wanted = {at for drawn in windows.values() for window in drawn for at in window.frame_idx}
    frames = {
        at: _small(frame, config.size)
        for at, frame in enumerate(upright_frames(_read(source.path, config)))
        if at in wanted
    }
    stem = Path(source.name).with_suffix("").as_posix().replace("/", "-")
    rows = []
    for split, drawn in windows.items():
        shown = ([_square(frames[at], window.position) for at in window.frame_idx] for window in drawn)
        moving = (film for film in shown if _change(film) >= config.min_change)
        films = list(itertools.islice(moving, source.num_clips[split]))
        as_filmed = [KINDS[0]] * len(films)
        kinds = as_filmed if split == "pretrain" else _kinds(len(films), source.start[split])
        for number, (film, (arrow, speed, order)) in enumerate(zip(films, kinds, strict=True)):
            path = f"{split}/{stem}-{number:05d}.mp4"
            clip = labelled_clip(film, config.num_frames, arrow, speed, order)
            _write(Path(config.out) / path, clip)
            rows.append((path, split, arrow, f"{speed}x", order, source.name))
    if not rows:
        raise BadVideoError(f"nothing moves in it: no window changes by --min-change {config.min_change:g}")
    return rows


def _windows(source: _Source) -> dict[str, list[_Window]]:
    """Windows by split, more than clips are asked for. Test windows lie in the last part of the video, the
    others before it: no frame is in both."""
    config, length = source.config, _window_length(source.config)
    cut = round(source.num_frames * (1 - config.test_share))
    windows: dict[str, list[_Window]] = {}
    for split, count in source.num_clips.items():
        begin, end = (cut, source.num_frames) if split == "test" else (0, cut)
        windows[split] = []
        for number in range(_WINDOWS_PER_CLIP * count):
            start, position = uniforms(config.seed, f"pretext {split} {source.name}", number, 2)
            first = begin + int(start * (end - begin - length + 1))
            windows[split].append(_Window(first=first, position=position, length=length))
    return windows


def _small(frame: UInt8[np.ndarray, "h w 3"], short_side: int) -> UInt8[np.ndarray, "h w 3"]:
    height, width, _ = frame.shape
    scale = short_side / min(height, width)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def _square(frame: UInt8[np.ndarray, "h w 3"], position: float) -> UInt8[np.ndarray, "s s 3"]:
    height, width, _ = frame.shape
    side = min(height, width)
    top, left = round(position * (height - side)), round(position * (width - side))
    return frame[top : top + side, left : left + side]


def _change(film: Frames) -> float:
    """Mean change of a value of 0 to 255 from frame to frame."""
    return float(np.abs(np.diff(np.stack(film).astype(np.int16), axis=0)).mean())


def _write(path: Path, clip: Frames) -> None:
    images = [av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in clip]
    height, width, _ = clip[0].shape
    write_whole(path, encode_mp4(images, width=width, height=height, fps=FPS, crf=CRF, pix_fmt=PIX_FMT))
