"""`salt-eval select`: which run is best, from its loss on held-out clips (arXiv:2509.24317, Figure 3), or from its teacher's (Figures 9 and 10)."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.command import console
from common.config import FrozenConfig, SelectConfig, TeacherComputeConfig
from common.data.shards import open_dataset
from common.model.checkpoint import CheckpointConfig, find_checkpoint, open_encoder, read_config
from common.model.teacher import Teacher
from common.whole import write_whole
from student_trainer.evaluation.features import first_clips
from student_trainer.evaluation.held_out import checkpoints, student_loss, targets_of, vpixel_loss
from student_trainer.evaluation.probe_table import checkpoint_name
from student_trainer.evaluation.rank import pooled, rankme
from student_trainer.evaluation.runs import Run, find_runs, read_json

NAMES = {"student-loss": "held-out loss", "teacher-loss": "the teacher's held-out loss", "rankme": "the teacher's RankMe"}
_FEWEST = 3
"""Probed checkpoints that make a line with something left over."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Accuracy = intercept + slope x, by least squares."""

    intercept: float
    slope: float
    r2: float
    num_points: int
    residual: float
    """Standard deviation of what is left, with n - 2 degrees of freedom."""
    mean_x: float
    spread_x: float
    """Sum of the squared distances from ``mean_x``."""

    def predict(self, x: float) -> tuple[float, float, float]:
        """Accuracy at ``x``, and the ends of the interval in which 95% of new points would lie."""
        from scipy.stats import t

        centre = self.intercept + self.slope * x
        widening = math.sqrt(1 + 1 / self.num_points + (x - self.mean_x) ** 2 / self.spread_x)
        half = float(t.ppf(0.975, self.num_points - 2)) * self.residual * widening
        return centre, centre - half, centre + half


def fit(xs: Sequence[float], accuracies: Sequence[float]) -> Line | None:
    """The line through probed checkpoints; None where they are fewer than three, or at one place."""
    x, y = np.array(xs, np.float64), np.array(accuracies, np.float64)
    if len(x) < _FEWEST or not np.ptp(x):
        return None
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean() - slope * x.mean())
    left = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    return Line(
        intercept=intercept,
        slope=slope,
        r2=1 - left / total if total else 0.0,
        num_points=len(x),
        residual=math.sqrt(left / (len(x) - 2)),
        mean_x=float(x.mean()),
        spread_x=spread,
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """A checkpoint."""

    name: str
    x: float
    accuracy: float | None
    """None where it was not probed."""


def run(config: SelectConfig) -> None:
    """Measures every checkpoint, prints the table, writes the files."""
    torch.set_num_threads(config.num_threads)
    runs, unfinished = find_runs(config.run_dirs, None)
    if unfinished:
        raise ValueError(f"got {unfinished[0]}, a run that has not finished, expected finished ones")
    configs = {one.name: read_config(one.path) for one in runs}
    teachers = {teacher.spec.fingerprint: (path, teacher) for path, teacher in _teachers(config, next(iter(configs.values())))}
    _require_comparable(config, runs, configs, list(teachers))
    accuracies = _accuracies(config)
    measured = _student_losses if config.by == "student-loss" else _of_teachers
    points = []
    for one, checkpoint, x in measured(config, runs, configs, teachers):
        is_newest = checkpoint.resolve() == find_checkpoint(one.path).resolve()
        names = [checkpoint_name(str(checkpoint)), *([one.name] if is_newest else [])]
        accuracy = next((accuracies[name] for name in names if name in accuracies), None)
        points.append(Point(name=names[-1], x=x, accuracy=accuracy))
    probed = [(point.x, point.accuracy) for point in points if point.accuracy is not None]
    line = fit([x for x, _ in probed], [accuracy for _, accuracy in probed])
    _write(config, points, line)
    Console().print(_table(config, points, line))


def _teachers(config: SelectConfig, own: CheckpointConfig) -> list[tuple[str, Teacher]]:
    compute = TeacherComputeConfig(batch_size=config.batch_size, num_threads=config.num_threads)
    sizes = {
        "num_frames": own.view.num_frames,
        "crop_size": own.view.crop_size,
        "patch_size": own.encoder.patch_size,
        "tubelet_size": own.encoder.tubelet_size,
    }
    return [(path, Teacher(open_encoder(FrozenConfig(ckpt=path, **sizes)), compute)) for path in config.teacher]


def _require_comparable(
    config: SelectConfig, runs: Sequence[Run], configs: Mapping[str, CheckpointConfig], fingerprints: Sequence[str]
) -> None:
    """Raises ValueError unless numbers of these runs may stand in one line."""
    if len({one.name for one in runs}) < len(runs):
        raise ValueError(f"got two runs of one name among {', '.join(one.name for one in runs)}, expected names that differ")
    for one in runs:
        if one.objective != "salt":
            raise ValueError(
                f"got {one.path}, a run of {one.objective}, expected students of a frozen teacher: only their losses mean the same"
            )
        if configs[one.name].teacher_fingerprint not in fingerprints:
            raise ValueError(
                f"got {one.path}, whose teacher is {(configs[one.name].teacher_fingerprint or 'none')[:12]}, expected one of those given as "
                f"--teacher: {', '.join(name[:12] for name in fingerprints)}"
            )
    if config.by != "student-loss":
        return
    found = {configs[one.name].teacher_fingerprint for one in runs}
    if len(found) > 1:
        raise ValueError(
            f"got runs of {len(found)} teachers, expected one: losses against different targets say nothing about each other. Select among the "
            "students of one teacher, or give --by teacher-loss"
        )
    first = configs[runs[0].name]
    for one in runs:
        if (configs[one.name].view.clip_shape, configs[one.name].mask) != (first.view.clip_shape, first.mask):
            raise ValueError(f"got {one.name} with other clips or masks than {runs[0].name}, expected the same: its task would be another")


Measured = Iterator[tuple[Run, Path, float]]
"""A run, one of its checkpoints, and the number that is held against its accuracy."""


def _student_losses(
    config: SelectConfig, runs: Sequence[Run], configs: Mapping[str, CheckpointConfig], teachers: Mapping[str, tuple[str, Teacher]]
) -> Measured:
    """Of every checkpoint."""
    own = configs[runs[0].name]
    _, clips = first_clips(config.data, config.split, own.view, config.loader, config.max_clips)
    _, teacher = teachers[own.teacher_fingerprint or ""]
    targets = targets_of(teacher, clips, config.batch_size)
    todo = [(one, path) for one in runs for path in checkpoints(one)]
    for one, path in track(todo, description="held-out loss", console=console, transient=True, disable=not console.is_terminal):
        yield one, path, student_loss(path, clips, seed=config.seed, targets=targets, device=_device())


def _of_teachers(
    config: SelectConfig, runs: Sequence[Run], configs: Mapping[str, CheckpointConfig], teachers: Mapping[str, tuple[str, Teacher]]
) -> Measured:
    """What each run's teacher is worth by itself, for the run's newest checkpoint."""
    worth: dict[str, float] = {}
    for one in runs:
        path, _ = teachers[configs[one.name].teacher_fingerprint or ""]
        if path not in worth:
            worth[path] = _rank_of(config, path) if config.by == "rankme" else _loss_of(config, path)
        yield one, find_checkpoint(one.path), worth[path]


def _rank_of(config: SelectConfig, teacher: str) -> float:
    samples = [sample for shard in open_dataset(config.data).samples(config.split) for sample in shard][: config.max_clips]
    encoder = open_encoder(FrozenConfig(ckpt=teacher))
    features, _ = pooled(encoder, samples, data=config.data, loader=config.loader, batch_size=config.batch_size, dtype="auto")
    if len(features) < features.shape[1]:
        raise ValueError(
            f"got {len(features)} clips for RankMe of {features.shape[1]} channels, expected at least as many: raise --max-clips"
        )
    return rankme(features)


def _loss_of(config: SelectConfig, teacher: str) -> float:
    path = Path(teacher)
    if not (path / "config.yaml").is_file() or read_config(path).objective != "vpixel":
        raise ValueError(f"got --teacher {teacher} with --by teacher-loss, expected the run directory of a V-Pixel teacher: it has a loss")
    (of_teacher,), _ = find_runs([teacher], None)
    _, clips = first_clips(config.data, config.split, read_config(path).view, config.loader, config.max_clips)
    norm = of_teacher.config["pixel_norm"]
    return vpixel_loss(find_checkpoint(path), clips, pixel_norm=norm, seed=config.seed, device=_device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _accuracies(config: SelectConfig) -> dict[str, float]:
    """The probed accuracies by name."""
    if config.probe is None:
        return {}
    probe = read_json(Path(config.probe))
    if probe is None:
        raise ValueError(f"got --probe {config.probe}, expected the JSON file of `salt-eval probe`: it is not there")
    labels = sorted(probe["labels"])
    if config.label not in labels and not (config.label is None and len(labels) == 1):
        raise ValueError(f"got --label {config.label}, expected one of {', '.join(labels)}, which {config.probe} has")
    label = config.label or labels[0]
    return {name: row[label] for name, row in probe["accuracy"].items()}


def _table(config: SelectConfig, points: Sequence[Point], line: Line | None) -> Table:
    if line is None:
        caption = f"R\u00b2 needs {_FEWEST} checkpoints with a probe (--probe) at different places"
    else:
        caption = f"R\u00b2 {line.r2:.3f} of {line.num_points} probed checkpoints; predictions with 95% intervals for new points"
    shown = Table(title=f"{NAMES[config.by]} on {config.split!r}", caption=caption)
    for name in ("checkpoint", NAMES[config.by], "accuracy", "predicted"):
        shown.add_column(name, justify="left" if name == "checkpoint" else "right")
    for point in sorted(points, key=lambda point: point.x, reverse=config.by == "rankme"):
        predicted = "" if line is None else "{:.3f}  [dim]{:.3f} to {:.3f}[/]".format(*line.predict(point.x))
        shown.add_row(point.name, f"{point.x:.4f}", "-" if point.accuracy is None else f"{point.accuracy:.3f}", predicted)
    return shown


def _write(config: SelectConfig, points: Sequence[Point], line: Line | None) -> None:
    rows: list[dict[str, Any]] = []
    for point in points:
        predicted = None if line is None else dict(zip(("accuracy", "low", "high"), line.predict(point.x), strict=True))
        rows.append({"name": point.name, "x": point.x, "accuracy": point.accuracy, "predicted": predicted})
    result = {
        "by": config.by,
        "split": config.split,
        "r2": None if line is None else line.r2,
        "num_probed": sum(point.accuracy is not None for point in points),
        "slope": None if line is None else line.slope,
        "intercept": None if line is None else line.intercept,
        "checkpoints": rows,
    }
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if line is not None:
        _draw(out.with_suffix(".png"), config, points, line)
    write_whole(out, json.dumps(result, indent=2) + "\n")


def _draw(path: Path, config: SelectConfig, points: Sequence[Point], line: Line) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = np.linspace(min(point.x for point in points), max(point.x for point in points), 50)
    centre, low, high = zip(*(line.predict(x) for x in ends), strict=True)
    axes.fill_between(ends, low, high, alpha=0.15, label="95% of new points")
    axes.plot(ends, centre, linewidth=1.2)
    for point in points:
        at = line.predict(point.x)[0] if point.accuracy is None else point.accuracy
        axes.plot(point.x, at, "o", color="C0", fillstyle="none" if point.accuracy is None else "full")
        axes.annotate(point.name, (point.x, at), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel(NAMES[config.by])
    axes.set_ylabel("probe accuracy (open: predicted)")
    axes.set_title(f"R\u00b2 = {line.r2:.3f}, {line.num_points} probed checkpoints", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
