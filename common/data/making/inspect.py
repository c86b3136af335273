"""What a data set holds: counts, durations, formats, bad files; and a contact sheet."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table

from salt_distill.common.config import InspectConfig
from salt_distill.common.console import new_results
from salt_distill.common.data.index import load_index
from salt_distill.common.data.skipped import FILE_NAME, read_skipped
from salt_distill.common.data.views import clip_span
from salt_distill.common.whole import write_whole

_MOST = 12
"""Rows of a table in the terminal; JSON has all."""
_BAR = 30


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How numbers lie."""

    least: float
    median: float
    most: float


@dataclass(frozen=True, kw_only=True)
class DurationSpread(Spread):
    """How durations lie, in seconds."""

    histogram: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class SkippedFile:
    """What is in no sample, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What a data set holds. Mappings are of a value to the number of its samples."""

    name: str
    kind: str
    """packed, indexed or mixture."""
    num_samples: int
    splits: dict[str, int]
    sources: dict[str, int]
    labels: dict[str, dict[str, int]]
    """Label -> class -> samples, in the order of the classes."""
    hours: float
    duration_s: DurationSpread
    num_frames: Spread
    frames_of_a_clip: int
    """Frames that a video has at least which gives a clip without repeating its last one."""
    num_shorter_than_a_clip: int
    fps: dict[str, int]
    resolutions: dict[str, int]
    """WIDTHxHEIGHT -> samples."""
    codecs: dict[str, int]
    num_duplicates: int
    """Samples that have the content of another."""
    num_shards: int
    missing_shards: list[str]
    shard_bytes: int
    video_bytes: int
    skipped: list[SkippedFile]


def inspect(config: InspectConfig) -> None:
    """Prints what a data set holds, and writes its contact sheet where one is asked for."""
    described = facts(config)
    if config.sheet is not None:
        from salt_distill.common.data.making.contact_sheet import contact_sheet
        from salt_distill.common.pictures import png_bytes

        write_whole(Path(config.sheet), png_bytes(contact_sheet(config)))
    if config.json_:
        print(json.dumps(asdict(described), indent=1, ensure_ascii=False))
    else:
        new_results().print(_report(described, config))


def facts(config: InspectConfig) -> DatasetFacts:
    """Everything that is counted. Raises ValueError or FileNotFoundError where there is no data set, or no
    such split."""
    folder = Path(config.data)
    info, index = load_index(folder)
    splits = index["split"].to_numpy()
    if config.split not in ("all", *splits):
        raise ValueError(
            f"{folder}: got split {config.split!r}, expected one of {', '.join(info.splits)}, or all"
        )
    index = index.filter(pa.array((splits == config.split) | (config.split == "all")))
    columns = {
        name: index[name].to_numpy()
        for name in ("duration_s", "num_frames", "fps", "width", "height", "size")
    }
    tars = dict.fromkeys(index["tar"].to_pylist())
    on_disk = {tar: (folder / tar).stat().st_size for tar in tars if (folder / tar).exists()}
    needed = min(clip_span(config.view), config.view.num_frames * config.view.frame_step)
    skipped = read_skipped(folder)
    return DatasetFacts(
        name=info.name,
        kind=info.kind,
        num_samples=len(index),
        splits=dict(Counter(index["split"].to_pylist())),
        sources=dict(Counter(index["source"].to_pylist())),
        labels=_labels(index, info.class_names),
        hours=float(columns["duration_s"].sum()) / 3600,
        duration_s=DurationSpread(
            **vars(_spread(columns["duration_s"])), histogram=histogram(columns["duration_s"])
        ),
        num_frames=_spread(columns["num_frames"]),
        frames_of_a_clip=needed,
        num_shorter_than_a_clip=int((columns["num_frames"] < needed).sum()),
        fps=_counts(f"{rate:.4g}" for rate in columns["fps"]),
        resolutions=_counts(
            f"{width}x{height}" for width, height in zip(columns["width"], columns["height"], strict=True)
        ),
        codecs=_counts(index["codec"].to_pylist()),
        num_duplicates=len(index) - len(set(index["sha256"].to_pylist())),
        num_shards=len(tars),
        missing_shards=sorted(set(tars) - set(on_disk)),
        shard_bytes=sum(on_disk.values()),
        video_bytes=int(columns["size"].sum()),
        skipped=[SkippedFile(path=path, reason=reason) for path, reason in skipped],
    )


def _counts(values: Iterable[str]) -> dict[str, int]:
    """Value -> how often, the most frequent first."""
    return dict(Counter(values).most_common())


def _spread(values: np.ndarray) -> Spread:
    return Spread(least=float(values.min()), median=float(np.median(values)), most=float(values.max()))


def histogram(values: np.ndarray) -> list[dict[str, float]]:
    """At most twelve bins [from, to) whose edges are whole multiples of 1, 2 or 5 tenths, ones, tens, ..."""
    least = max(float(values.max() - values.min()) / 10, 0.1)
    decade = 10.0 ** math.floor(math.log10(least) + 1e-9)
    width = decade * next(factor for factor in (1, 2, 5, 10) if factor * decade >= least * (1 - 1e-9))
    place = np.floor(values / width).astype(np.int64)
    counts = Counter(place.tolist())
    return [
        {"from": round(number * width, 6), "to": round((number + 1) * width, 6), "count": counts[number]}
        for number in range(int(place.min()), int(place.max()) + 1)
    ]


def _labels(index: pa.Table, class_names: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """Label -> class -> samples; classes without one are there with 0."""
    counts = {label: Counter[int]() for label in class_names}
    for labels in index["labels"].to_pylist():
        for label, value in labels:
            counts[label][value] += 1
    return {
        label: {name: counts[label][value] for value, name in enumerate(names)}
        for label, names in class_names.items()
    }


def _report(facts: DatasetFacts, config: InspectConfig) -> RenderableType:
    """The same for people."""
    bars = [
        (f"{each['from']:g} to {each['to']:g} s", int(each["count"])) for each in facts.duration_s.histogram
    ]
    tables = [
        *(
            _most(title, counts)
            for title, counts in (
                ("codec", facts.codecs),
                ("size", facts.resolutions),
                ("frames/s", facts.fps),
            )
        ),
        *([_most("source", facts.sources)] if len(facts.sources) > 1 else []),
        *(_most(label, classes) for label, classes in facts.labels.items()),
    ]
    parts: list[RenderableType] = [
        f"[bold]{facts.name}[/] ({facts.kind})",
        _summary(facts, Path(config.data)),
        _bars("duration", bars),
        Columns(tables, padding=(0, 2)),
    ]
    if facts.skipped:
        parts.append(_most("reason of a skip", _counts(file.reason for file in facts.skipped)))
    return Group(*parts)


def _summary(facts: DatasetFacts, data: Path) -> Table:
    """A line for each count of the whole."""
    seconds, frames = facts.duration_s, facts.num_frames
    splits = ", ".join(f"{count:,} {split}" for split, count in facts.splits.items())
    skipped = f"{len(facts.skipped):,} files, named in {data / FILE_NAME}" if facts.skipped else "0 files"
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("samples", f"{facts.num_samples:,} ({splits})"),
        (
            "duration",
            f"{facts.hours:,.2f} hours; {seconds.least:.2f} to {seconds.most:.2f} s, median"
            f" {seconds.median:.2f} s",
        ),
        ("frames", f"{frames.least:,.0f} to {frames.most:,.0f}, median {frames.median:,.0f}"),
        (
            "repeating",
            f"{facts.num_shorter_than_a_clip:,} have fewer than the {facts.frames_of_a_clip} frames that a"
            " clip spans, and repeat their last",
        ),
        (
            "on disk",
            f"{facts.shard_bytes / 1e6:,.1f} MB in {facts.num_shards:,} shards,"
            f" {facts.video_bytes / 1e6:,.1f} MB of them videos",
        ),
        (
            "missing",
            f"{len(facts.missing_shards):,} shards" + "".join(f" {tar}" for tar in facts.missing_shards[:1]),
        ),
        ("duplicates", f"{facts.num_duplicates:,} samples have the content of another"),
        ("skipped", skipped),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    return table


def _bars(title: str, rows: Sequence[tuple[str, int]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(title)
    table.add_column("samples", justify="right")
    table.add_column("")
    most = max(count for _, count in rows)
    for name, count in rows:
        table.add_row(name, f"{count:,}", "█" * round(_BAR * count / most))
    return table


def _most(title: str, counts: dict[str, int]) -> Table:
    """The first rows of a table, and how many there are beside them."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column(title)
    table.add_column("samples" if title != "reason of a skip" else "files", justify="right")
    for name, count in list(counts.items())[:_MOST]:
        table.add_row(name, f"{count:,}")
    if len(counts) > _MOST:
        table.add_row(
            f"[dim]and {len(counts) - _MOST} more[/]", f"[dim]{sum(list(counts.values())[_MOST:]):,}[/]"
        )
    return table
