"""`salt-eval select`: which run is best, from its loss on held-out clips (arXiv:2509.24317, Figure 3), or
from its teacher's (Figures 9 and 10)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from salt_distill.common.config import FrozenConfig, SelectConfig, TeacherComputeConfig
from salt_distill.common.console import console
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.model.checkpoint import CheckpointConfig, find_checkpoint, open_encoder, read_config
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.held_out import (
    checkpoints,
    student_loss,
    targets_of,
    vpixel_loss,
)
from salt_distill.student_trainer.evaluation.probe.features import first_clips
from salt_distill.student_trainer.evaluation.probe.table import checkpoint_name
from salt_distill.student_trainer.evaluation.rank import pooled, rankme
from salt_distill.student_trainer.evaluation.report.figures import save_accuracy_by_line
from salt_distill.student_trainer.evaluation.runs import Run, find_runs, read_json
from salt_distill.student_trainer.evaluation.selection import NAMES, Measured, Selection


def run(config: SelectConfig) -> None:
    """Measures every checkpoint, prints the table, writes the files."""
    torch.set_num_threads(config.num_threads)
    runs, unfinished = find_runs(config.run_dirs, None)
    if unfinished:
        raise ValueError(f"got {unfinished[0]}, a run that has not finished, expected finished ones")
    configs = {one.name: read_config(one.path) for one in runs}
    teachers = {
        teacher.spec.fingerprint: (path, teacher)
        for path, teacher in _teachers(config, next(iter(configs.values())))
    }
    _require_comparable(config, runs, configs, list(teachers))
    label, accuracies = _accuracies(config)
    measured = _student_losses if config.by == "student-loss" else _of_teachers
    points = []
    for one, checkpoint, x in measured(config, runs, configs, teachers):
        is_newest = checkpoint.resolve() == find_checkpoint(one.path).resolve()
        names = [checkpoint_name(str(checkpoint)), *([one.name] if is_newest else [])]
        accuracy = next((accuracies[name] for name in names if name in accuracies), None)
        points.append(Measured(name=names[-1], x=x, accuracy=accuracy))
    selection = Selection.of(by=config.by, split=config.split, label=label, points=points)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if selection.line is not None:
        save_accuracy_by_line(selection, out.with_suffix(".png"))
    write_whole(out, json.dumps(selection.as_json(), indent=2) + "\n")
    Console().print(_table(selection))


def _teachers(config: SelectConfig, own: CheckpointConfig) -> list[tuple[str, Teacher]]:
    compute = TeacherComputeConfig(batch_size=config.batch_size, num_threads=config.num_threads)
    sizes = {
        "num_frames": own.view.num_frames,
        "crop_size": own.view.crop_size,
        "patch_size": own.encoder.patch_size,
        "tubelet_size": own.encoder.tubelet_size,
    }
    return [
        (path, Teacher(open_encoder(FrozenConfig(ckpt=path, **sizes)), compute)) for path in config.teacher
    ]


def _require_comparable(
    config: SelectConfig,
    runs: Sequence[Run],
    configs: Mapping[str, CheckpointConfig],
    fingerprints: Sequence[str],
) -> None:
    """Raises ValueError unless numbers of these runs may stand in one line."""
    if len({one.name for one in runs}) < len(runs):
        raise ValueError(
            f"got two runs of one name among {', '.join(one.name for one in runs)}, expected names that"
            " differ"
        )
    for one in runs:
        if one.objective != "salt":
            raise ValueError(
                f"got {one.path}, a run of {one.objective}, expected students of a frozen teacher: only their"
                " losses mean the same"
            )
        if configs[one.name].teacher_fingerprint not in fingerprints:
            raise ValueError(
                f"got {one.path}, whose teacher is {(configs[one.name].teacher_fingerprint or 'none')[:12]},"
                f" expected one of those given as --teacher: {', '.join(name[:12] for name in fingerprints)}"
            )
    if config.by != "student-loss":
        return
    found = {configs[one.name].teacher_fingerprint for one in runs}
    if len(found) > 1:
        raise ValueError(
            f"got runs of {len(found)} teachers, expected one: losses against different targets say nothing"
            " about each other. Select among the students of one teacher, or give --by teacher-loss"
        )
    first = configs[runs[0].name]
    for one in runs:
        if (configs[one.name].view.clip_shape, configs[one.name].mask) != (first.view.clip_shape, first.mask):
            raise ValueError(
                f"got {one.name} with other clips or masks than {runs[0].name}, expected the same: its task"
                " would be another"
            )


Measurements = Iterator[tuple[Run, Path, float]]
"""A run, one of its checkpoints, and the number that is held against its accuracy."""


def _student_losses(
    config: SelectConfig,
    runs: Sequence[Run],
    configs: Mapping[str, CheckpointConfig],
    teachers: Mapping[str, tuple[str, Teacher]],
) -> Measurements:
    """Of every checkpoint."""
    own = configs[runs[0].name]
    _, clips = first_clips(config.data, config.split, own.view, config.loader, config.max_clips)
    _, teacher = teachers[own.teacher_fingerprint or ""]
    targets = targets_of(teacher, clips, config.batch_size)
    todo = [(one, path) for one in runs for path in checkpoints(one)]
    for one, path in track(
        todo, description="held-out loss", console=console, transient=True, disable=not console.is_terminal
    ):
        yield one, path, student_loss(path, clips, seed=config.seed, targets=targets, device=_device())


def _of_teachers(
    config: SelectConfig,
    runs: Sequence[Run],
    configs: Mapping[str, CheckpointConfig],
    teachers: Mapping[str, tuple[str, Teacher]],
) -> Measurements:
    """What each run's teacher is worth by itself, for the run's newest checkpoint."""
    worth: dict[str, float] = {}
    for one in runs:
        path, _ = teachers[configs[one.name].teacher_fingerprint or ""]
        if path not in worth:
            worth[path] = _rank_of(config, path) if config.by == "rankme" else _loss_of(config, path)
        yield one, find_checkpoint(one.path), worth[path]


def _rank_of(config: SelectConfig, teacher: str) -> float:
    samples = [sample for shard in open_dataset(config.data).samples(config.split) for sample in shard][
        : config.max_clips
    ]
    encoder = open_encoder(FrozenConfig(ckpt=teacher))
    features, _ = pooled(
        encoder, samples, data=config.data, loader=config.loader, batch_size=config.batch_size, dtype="auto"
    )
    if len(features) < features.shape[1]:
        raise ValueError(
            f"got {len(features)} clips for RankMe of {features.shape[1]} channels, expected at least as"
            " many: raise --max-clips"
        )
    return rankme(features)


def _loss_of(config: SelectConfig, teacher: str) -> float:
    path = Path(teacher)
    if not (path / "config.yaml").is_file() or read_config(path).objective != "vpixel":
        raise ValueError(
            f"got --teacher {teacher} with --by teacher-loss, expected the run directory of a V-Pixel"
            " teacher: it has a loss"
        )
    (of_teacher,), _ = find_runs([teacher], None)
    _, clips = first_clips(config.data, config.split, read_config(path).view, config.loader, config.max_clips)
    norm = of_teacher.config["pixel_norm"]
    return vpixel_loss(find_checkpoint(path), clips, pixel_norm=norm, seed=config.seed, device=_device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _accuracies(config: SelectConfig) -> tuple[str | None, dict[str, float]]:
    """The label that is meant, and its probed accuracies by name."""
    if config.probe is None:
        return None, {}
    probe = read_json(Path(config.probe))
    if probe is None:
        raise ValueError(
            f"got --probe {config.probe}, expected the JSON file of `salt-eval probe`: it is not there"
        )
    labels = sorted(probe["labels"])
    if config.label not in labels and not (config.label is None and len(labels) == 1):
        raise ValueError(
            f"got --label {config.label}, expected one of {', '.join(labels)}, which {config.probe} has"
        )
    label = config.label or labels[0]
    return label, {name: row[label] for name, row in probe["accuracy"].items()}


def _table(selection: Selection) -> Table:
    what, line = NAMES[selection.by], selection.line
    shown = Table(title=f"{what} on {selection.split!r}", caption=selection.verdict)
    for name in ("checkpoint", what, "accuracy", "predicted"):
        shown.add_column(name, justify="left" if name == "checkpoint" else "right")
    for point in selection.in_order:
        predicted = "" if line is None else "{:.3f}  [dim]{:.3f} to {:.3f}[/]".format(*line.predict(point.x))
        shown.add_row(
            point.name,
            f"{point.x:.4f}",
            "-" if point.accuracy is None else f"{point.accuracy:.3f}",
            predicted,
        )
    return shown
