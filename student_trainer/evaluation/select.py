"""`salt-eval select`: which run is best, from its loss on held-out clips (arXiv:2509.24317, Figure 3), or
from its teacher's (Figures 9 and 10)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table

from salt_distill.common.config import FrozenConfig, SelectConfig, TeacherComputeConfig, ViewConfig
from salt_distill.common.console import console, new_results
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.devices import device_here
from salt_distill.common.model.checkpoint import CheckpointConfig, find_checkpoint, open_encoder, read_config
from salt_distill.common.model.teacher import Teacher, fingerprint
from salt_distill.student_trainer.evaluation.candidates import checkpoint_name
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun, find_finished
from salt_distill.student_trainer.evaluation.held_out import (
    checkpoints,
    student_loss,
    targets_of,
    vpixel_loss,
)
from salt_distill.student_trainer.evaluation.probe.features import first_clips
from salt_distill.student_trainer.evaluation.probe.results import ProbeResults, chosen_label
from salt_distill.student_trainer.evaluation.rank import pooled, rankme
from salt_distill.student_trainer.evaluation.records import index_hash
from salt_distill.student_trainer.evaluation.report.figures import save_accuracy_by_line
from salt_distill.student_trainer.evaluation.selection import NAMES, MeasuredCheckpoint, SelectResults


def run(config: SelectConfig) -> None:
    """Measures every checkpoint, prints the table, writes the files."""
    torch.set_num_threads(config.num_threads)
    runs, unfinished = find_finished(config.run_dirs, None)
    if unfinished:
        raise ValueError(f"got {unfinished[0]}, a run that has not finished, expected finished ones")
    configs = {run.name: read_config(run.path) for run in runs}
    teachers = {
        teacher.spec.fingerprint: (path, teacher)
        for path, teacher in _teachers(config, next(iter(configs.values())))
    }
    _require_comparable(config, runs, configs, list(teachers))
    probe = None if config.probe is None else ProbeResults.read(Path(config.probe))
    label = None if probe is None else chosen_label(probe.labels, config.label, config.probe or "")
    measured = {"student-loss": _student_losses, "student-rankme": _student_ranks}.get(
        config.by, _of_teachers
    )
    results = SelectResults.of(
        [
            _checkpoint(run, checkpoint, x, probe, label)
            for run, checkpoint, x in measured(config, runs, configs, teachers)
        ],
        by=config.by,
        split=config.split,
        index_hash=index_hash(config.data),
        label=label,
        probe_index_hash=None if probe is None else probe.index_hash,
    )
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if results.line is not None:
        save_accuracy_by_line(results, out.with_suffix(".png"))
    results.write(out)
    new_results().print(_table(results))


def _checkpoint(
    run: FinishedRun, checkpoint: Path, x: float, probe: ProbeResults | None, label: str | None
) -> MeasuredCheckpoint:
    """A checkpoint with the accuracy of its weights, or why there is none."""
    encoder = open_encoder(FrozenConfig(ckpt=str(checkpoint)))
    identity = fingerprint(encoder, encoder.load())
    is_newest = checkpoint.resolve() == find_checkpoint(run.path).resolve()
    name = run.name if is_newest else checkpoint_name(str(checkpoint))
    accuracy = not_measured = None
    if probe is not None and label is not None:
        row = probe.named(identity, name)
        if row is not None:
            accuracy = probe.accuracy[row][label]
        elif name in probe.accuracy:
            other = probe.encoders[name].fingerprint[:12]
            not_measured = f"the probe's {name} has other weights ({other}, these are {identity[:12]})"
        else:
            not_measured = "not probed"
    return MeasuredCheckpoint(
        name=name, fingerprint=identity, x=x, accuracy=accuracy, not_measured=not_measured
    )


def _teachers(config: SelectConfig, student: CheckpointConfig) -> list[tuple[str, Teacher]]:
    compute = TeacherComputeConfig(batch_size=config.batch_size, num_threads=config.num_threads)
    sizes = {
        "num_frames": student.view.num_frames,
        "crop_size": student.view.crop_size,
        "patch_size": student.encoder.patch_size,
        "tubelet_size": student.encoder.tubelet_size,
    }
    return [
        (path, Teacher(open_encoder(FrozenConfig(ckpt=path, **sizes)), compute)) for path in config.teacher
    ]


def _require_comparable(
    config: SelectConfig,
    runs: Sequence[FinishedRun],
    configs: Mapping[str, CheckpointConfig],
    fingerprints: Sequence[str],
) -> None:
    """Raises ValueError unless numbers of these runs may stand in one line."""
    for run in runs:
        if run.objective != "salt":
            raise ValueError(
                f"got {run.path}, a run of {run.objective}, expected students of a frozen teacher: only their"
                " losses mean the same"
            )
        _teacher_of(run, configs[run.name], fingerprints)
    if config.by not in ("student-loss", "student-rankme"):
        return
    targets = {_teacher_of(run, configs[run.name], fingerprints) for run in runs}
    if len(targets) > 1:
        raise ValueError(
            f"got runs of {len(targets)} teachers, expected one: losses against different targets say"
            " nothing about each other. Select among the students of one teacher, or give --by teacher-loss"
        )
    first = configs[runs[0].name]
    for run in runs:
        config_of_run = configs[run.name]
        if (_clips_of(config_of_run.view), config_of_run.mask) != (_clips_of(first.view), first.mask):
            raise ValueError(
                f"got {run.name} with other clips or masks than {runs[0].name}, expected the same: its task"
                " would be another"
            )


def _teacher_of(run: FinishedRun, config: CheckpointConfig, given: Collection[str]) -> str:
    """Fingerprint of the one among ``given`` that a run learned from. Raises ValueError where none of them or
    several are."""
    of_run = [teacher for teacher in config.teacher_fingerprint if teacher in given]
    if len(of_run) > 1:
        raise ValueError(
            f"got {run.path}, which learned from {' and '.join(teacher[:12] for teacher in of_run)}, expected"
            " one --teacher of these: it is measured by one teacher's targets"
        )
    if not of_run:
        own = ", ".join(teacher[:12] for teacher in config.teacher_fingerprint)
        raise ValueError(
            f"got {run.path}, whose teacher is {own or 'none'}, expected one of those given as --teacher:"
            f" {', '.join(name[:12] for name in given)}"
        )
    return of_run[0]


Measurements = Iterator[tuple[FinishedRun, Path, float]]
"""A run, one of its checkpoints, and the number that is held against its accuracy."""


def _student_losses(
    config: SelectConfig,
    runs: Sequence[FinishedRun],
    configs: Mapping[str, CheckpointConfig],
    teachers: Mapping[str, tuple[str, Teacher]],
) -> Measurements:
    """Of every checkpoint."""
    student = configs[runs[0].name]
    _, clips = first_clips(config.data, config.split, student.view, config.loader, config.num_clips)
    identity = _teacher_of(runs[0], student, teachers)
    _, teacher = teachers[identity]
    targets = targets_of(teacher, clips, config.batch_size)
    todo = [(run, path) for run in runs for path in checkpoints(run.path)]
    for run, path in track(
        todo, description="held-out loss", console=console, transient=True, disable=not console.is_terminal
    ):
        loss = student_loss(
            path, clips, seed=config.seed, teacher=identity, targets=targets, device=device_here()
        )
        yield run, path, loss


def _of_teachers(
    config: SelectConfig,
    runs: Sequence[FinishedRun],
    configs: Mapping[str, CheckpointConfig],
    teachers: Mapping[str, tuple[str, Teacher]],
) -> Measurements:
    """What each run's teacher is worth by itself, for the run's newest checkpoint."""
    worth: dict[str, float] = {}
    for run in runs:
        path, _ = teachers[_teacher_of(run, configs[run.name], teachers)]
        if path not in worth:
            worth[path] = _rank_of(config, path) if config.by == "rankme" else _loss_of(config, path)
        yield run, find_checkpoint(run.path), worth[path]


def _student_ranks(
    config: SelectConfig,
    runs: Sequence[FinishedRun],
    configs: Mapping[str, CheckpointConfig],
    teachers: Mapping[str, tuple[str, Teacher]],
) -> Measurements:
    """Of every checkpoint."""
    todo = [(run, path) for run in runs for path in checkpoints(run.path)]
    for run, path in track(
        todo, description="RankMe", console=console, transient=True, disable=not console.is_terminal
    ):
        yield run, path, _rank_of(config, str(path))


def _clips_of(view: ViewConfig) -> tuple[object, ...]:
    """What decides which pixels of a held-out video a run is measured on."""
    return view.clip_shape, view.frame_step, view.sampling


def _rank_of(config: SelectConfig, ckpt: str) -> float:
    samples = [sample for shard in open_dataset(config.data).samples(config.split) for sample in shard][
        : config.num_clips
    ]
    encoder = open_encoder(FrozenConfig(ckpt=ckpt))
    features = pooled(
        encoder, samples, data=config.data, loader=config.loader, batch_size=config.batch_size, dtype="auto"
    ).means
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
    (of_teacher,), _ = find_finished([teacher], None)
    _, clips = first_clips(config.data, config.split, read_config(path).view, config.loader, config.num_clips)
    norm = of_teacher.settings.pixel_norm
    return vpixel_loss(find_checkpoint(path), clips, pixel_norm=norm, seed=config.seed, device=device_here())


def _table(results: SelectResults) -> Table:
    measure = NAMES[results.by]
    table = Table(title=f"{measure} on {results.split!r}", caption=results.verdict)
    for name in ("checkpoint", measure, "accuracy", "predicted"):
        table.add_column(name, justify="left" if name == "checkpoint" else "right")
    for row in results.in_order:
        predicted = row.predicted
        table.add_row(
            row.name,
            f"{row.x:.4f}",
            row.not_measured or "-" if row.accuracy is None else f"{row.accuracy:.3f}",
            ""
            if predicted is None
            else f"{predicted.accuracy:.3f}  [dim]{predicted.low:.3f} to {predicted.high:.3f}[/]",
        )
    return table
