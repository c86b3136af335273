"""Videos -> WebDataset shards with an index (DESIGN section 4, Shards)."""

import csv
import io
import json
import os
import re
import shutil
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import rich.console
from rich.progress import track

from common.config import PackConfig
from common.data.encode import encode_mp4
from common.data.shards import VIDEO_SUFFIXES, describe, sidecar, write_index
from common.data.video import BadVideoError, probe, upright_frames

MIN_FRAMES = 2
MIN_SIDE = 8
"""Pixels. Smaller videos show nothing that an encoder could learn from."""
_REENCODE_CRF = 18
_READ_AHEAD = 64
_FILES = {"index.parquet", "dataset.json", "skipped.csv"}
"""What a packed folder holds beside its tars."""


@dataclass(frozen=True)
class Source:
    """One video before it is packed."""

    path: Path
    name: str
    """Path inside the source, with its suffix."""
    labels: dict[str, int]
    split: str


def pack(config: PackConfig, console: rich.console.Console) -> None:
    """Writes the shards, then the index; bad files are named in ``skipped.csv``.

    Raises ValueError where nothing can be read, more than ``max_bad_fraction`` is bad, or OUT holds something else.
    """
    src, out = Path(config.src), Path(config.out)
    name = config.name or (src.stem if src.is_file() else src.resolve().name)
    sources, class_names = _sources(src)
    _require_ours(out)
    partial, replaced = (out.resolve().with_name(f".{word}-{out.resolve().name}") for word in ("partial", "replaced"))
    for left_over in (partial, replaced):
        if left_over.exists():
            shutil.rmtree(left_over)
    partial.mkdir(parents=True)
    skipped: list[tuple[str, str]] = []
    shards = _Shards(partial, name, config.max_shard_bytes)
    with ProcessPoolExecutor(config.workers or os.cpu_count()) as pool:
        read = _in_order(pool, [source.path for source in sources], config.short_side)
        shown = track(read, total=len(sources), description="pack", console=console, disable=not console.is_terminal)
        for number, (source, video) in enumerate(zip(sources, shown, strict=True)):
            if isinstance(video, str):
                skipped.append((str(source.path), video))
                continue
            data, facts, suffix = video
            values = describe(f"{name}/{source.name}", data, facts, labels=source.labels, split=source.split, source=name)
            # Numbered among the good ones: a bad file beside them changes no byte of a shard.
            shards.add(f"{number - len(skipped):08d}", suffix, data, sidecar(values))
    shards.close()
    _check_bad(skipped, len(sources), config.max_bad_fraction, partial)
    with (partial / "skipped.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *skipped])
    write_index(partial, name=name, class_names=class_names)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    if replaced.exists():
        shutil.rmtree(replaced)
    for path, reason in skipped:
        console.print(f"skipped {path}: {reason}", highlight=False, markup=False, soft_wrap=True)
    info = json.loads((out / "dataset.json").read_text())
    splits = ", ".join(f"{count} {split}" for split, count in info["splits"].items())
    named = f", {len(skipped)} skipped (named in {out / 'skipped.csv'})" if skipped else ""
    console.print(f"{out}: {info['num_samples']} videos ({splits}) in {info['num_shards']} shards{named}", highlight=False, soft_wrap=True)


def _sources(src: Path) -> tuple[list[Source], dict[str, list[str]]]:
    """The videos in sorted order, and label -> class names."""
    if src.is_dir() and (src / "labels.csv").is_file():
        src = src / "labels.csv"
    if src.is_file():
        return _from_csv(src)
    if not src.is_dir():
        raise ValueError(f"got SRC {src}, expected a folder of videos or a CSV file: there is none")
    paths = sorted(path for path in src.rglob("*") if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES)
    if not paths:
        raise ValueError(f"got SRC {src}, expected videos in it or in its subfolders ({' '.join(sorted(VIDEO_SUFFIXES))})")
    return [Source(path, path.relative_to(src).as_posix(), {}, "train") for path in paths], {}


def _from_csv(path: Path) -> tuple[list[Source], dict[str, list[str]]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "path" not in rows[0]:
        raise ValueError(
            f"{path}: got columns {list(rows[0]) if rows else []}, expected a header with `path`, then a column per label, and maybe `split`"
        )
    labels = [column for column in rows[0] if column not in ("path", "split")]
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}: line {number} has not as many cells as the header, which names {len(rows[0])} columns")
    class_names = {label: _classes({row[label] for row in rows if row[label]}) for label in labels}
    sources = [
        Source(
            path.parent / row["path"],
            row["path"],
            {label: class_names[label].index(row[label]) for label in labels if row[label]},
            row.get("split") or "train",
        )
        for row in sorted(rows, key=lambda row: row["path"])
    ]
    if len({source.name for source in sources}) < len(sources):
        raise ValueError(f"{path}: two rows have the same path, expected each video once")
    return sources, class_names


def _classes(values: set[str]) -> list[str]:
    """Numbers in their order, else names in theirs; a label's value is its position in the list."""
    numbers = all(value.isdigit() for value in values)
    return sorted(values, key=int) if numbers else sorted(values)


def _in_order(pool: ProcessPoolExecutor, paths: list[Path], short_side: int | None) -> Iterator[tuple[bytes, Any, str] | str]:
    """``_read_video`` of each path; a bounded number of them ahead of the one that is written, since each holds a whole video."""
    ahead: deque[Future[tuple[bytes, Any, str] | str]] = deque()
    for path in paths:
        ahead.append(pool.submit(_read_video, path, short_side))
        if len(ahead) == _READ_AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _read_video(path: Path, short_side: int | None) -> tuple[bytes, Any, str] | str:
    """(bytes, facts, suffix), or why not; runs in a worker process."""
    try:
        data = path.read_bytes()
        facts = probe(data)
        if facts.num_frames < MIN_FRAMES or min(facts.width, facts.height) < MIN_SIDE:
            return (
                f"{facts.num_frames} frames of {facts.width}x{facts.height} pixels, expected at least {MIN_FRAMES} of {MIN_SIDE}x{MIN_SIDE}"
            )
        if short_side is None:
            return data, facts, path.suffix.lower()
        data = _shrink(data, facts.width, facts.height, facts.fps, short_side)
        return data, probe(data), ".mp4"
    except (BadVideoError, OSError) as error:
        return str(error)


def _shrink(data: bytes, width: int, height: int, fps: float, short_side: int) -> bytes:
    """Every frame, smaller; sides are even, as 4:2:0 needs them."""
    scale = min(1.0, short_side / min(width, height))
    small_width, small_height = (max(MIN_SIDE, 2 * round(side * scale / 2)) for side in (width, height))
    frames = (_small_frame(frame, small_width, small_height) for frame in upright_frames(data))
    return encode_mp4(frames, width=small_width, height=small_height, fps=fps, crf=_REENCODE_CRF)


def _small_frame(frame: np.ndarray, width: int, height: int) -> av.VideoFrame:
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return image.reformat(width=width, height=height, interpolation="AREA")


class _Shards:
    """Tars of bounded size, the same bytes for the same videos."""

    def __init__(self, folder: Path, name: str, max_bytes: int) -> None:
        self._folder, self._name, self._max_bytes = folder, name, max_bytes
        self._tar: tarfile.TarFile | None = None
        self._num_shards = 0
        self._num_bytes = 0

    def add(self, stem: str, suffix: str, data: bytes, facts: bytes) -> None:
        if self._tar is None or self._num_bytes + len(data) > self._max_bytes:
            self.close()
            self._tar = tarfile.open(self._folder / f"{self._name}-{self._num_shards:06d}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._num_shards, self._num_bytes = self._num_shards + 1, 0
        for member, content in ((stem + suffix, data), (stem + ".json", facts)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
            self._num_bytes += len(content)

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()


def _require_ours(out: Path) -> None:
    """Only what this command wrote is ever replaced; shards that others packed have no skipped.csv."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    others = sorted(name for name in names - _FILES if not re.fullmatch(r".+-\d{6}\.tar", name))
    if names and (others or not names >= _FILES):
        raise ValueError(
            f"got OUT {out}, which holds something else than shards of this command ({', '.join(others or sorted(names))[:80]}), "
            "expected a new folder or one that this command wrote"
        )


def _check_bad(skipped: list[tuple[str, str]], num_videos: int, max_bad_fraction: float, partial: Path) -> None:
    if len(skipped) > max_bad_fraction * num_videos or len(skipped) == num_videos:
        shutil.rmtree(partial)
        named = "; ".join(f"{path}: {reason}" for path, reason in skipped[:3])
        raise ValueError(
            f"{len(skipped)} of {num_videos} videos cannot be read, expected at most a share of --max-bad-fraction {max_bad_fraction}: {named}"
        )
