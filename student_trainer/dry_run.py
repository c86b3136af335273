"""`salt-train ... --dry-run`: all that a run opens, and its first steps on its own clips and targets. Writes
nothing."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from salt_distill.common.config import StudentRun, TrainConfig, name_of_size
from salt_distill.common.console import new_results
from salt_distill.common.devices import device_here
from salt_distill.common.model.compute import precision, wait_for
from salt_distill.common.model.flops import num_parameters
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.teacher import TeacherSpec, device_kind
from salt_distill.student_trainer.batches import Batches
from salt_distill.student_trainer.estimate import peak_bytes
from salt_distill.student_trainer.estimate_table import duration
from salt_distill.student_trainer.job import dry_run_job
from salt_distill.student_trainer.loop import assembled, update
from salt_distill.student_trainer.opening import opened
from salt_distill.student_trainer.optim import set_schedule
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.run_directory import check_run
from salt_distill.student_trainer.targets.source import source_order
from salt_distill.student_trainer.validation import Validation

_STEPS = 2
"""The first one warms up, the last one is timed."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What the beginning of a run came to."""

    world_size: int
    device: str
    """Of the first worker."""
    precision: str
    """Of matrix products."""
    num_samples: int
    decoder: str
    num_parameters: dict[str, int]
    """Of encoder and predictor."""
    teachers: list[str]
    """Fingerprint of each, and how it computes."""
    losses: list[float]
    """Of the steps."""
    num_bad: int
    """Clips of the steps that could not be decoded."""
    read_s: float
    """To read a step's clips."""
    teacher_wait_s: float
    """Of the last step for its targets."""
    compute_s: float
    """Of the last step."""
    peak_bytes: int
    """Of a worker."""

    @property
    def step_s(self) -> float:
        """A run reads clips while it computes."""
        return max(self.read_s, self.teacher_wait_s + self.compute_s)


def run(config: TrainConfig) -> None:
    """Prints what was found. Raises what the run itself would."""
    quiet = _without_traces(config)
    if config.workers == 0:
        device = device_here(config)
        found = begin(quiet, Worker(rank=0, world_size=1, device=device))
    else:
        found = dry_run_job(quiet)
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(config, found):
        table.add_row(name, value)
    new_results().print(table)


def begin(config: TrainConfig, worker: Worker) -> DryRun:
    """Opens everything, and makes the first steps; every rank calls it."""
    torch.set_num_threads(config.num_threads)
    with opened(config, worker) as (reader, sources):
        objective, model, optimizer, _ = assembled(config, sources, worker, None)
        Validation(config, worker, objective, reader, sources, start=None)
        losses, num_bad, num_steps = [], 0, min(_STEPS, config.steps)
        read_s = teacher_wait_s = compute_s = 0.0
        for future in Batches.of(config, reader, sources, worker).steps(1, num_steps):
            batch, read_s = worker.ranks.result(future)
            targets, teacher_wait_s = worker.ranks.results(batch.targets)
            since = time.perf_counter()
            set_schedule(optimizer, config.optim, step=batch.step, steps=config.steps)
            losses.append(update(model, optimizer, batch, targets, config, worker).loss.item())
            wait_for(worker.device)
            compute_s = time.perf_counter() - since
            num_bad += int((~batch.clips.good).sum())
        return DryRun(
            world_size=worker.world_size,
            device=device_kind(worker.device),
            precision=precision(config.compute.dtype, worker.device),
            num_samples=reader.num_samples,
            decoder=reader.decoder,
            num_parameters={
                "encoder": num_parameters(objective.encoder),
                "predictor": num_parameters(objective.predictor),
            },
            teachers=[_described(source.spec) for source in sources],
            losses=losses,
            num_bad=sum(worker.ranks.all_values(num_bad)),
            read_s=read_s,
            teacher_wait_s=teacher_wait_s,
            compute_s=compute_s,
            peak_bytes=max(worker.ranks.all_values(peak_bytes(worker.device))),
        )


def _without_traces(config: TrainConfig) -> TrainConfig:
    """The same, without what it would leave on disks, ports and boards, and in groups; a step is read when
    the one before is done, so that each part is timed by itself."""
    none = {"wandb": None, "metrics_port": None}
    if isinstance(config, StudentRun):
        none |= {"cache": (), "group": None}
    return config.model_copy(
        update=none
        | {
            "out": str(Path(config.out).with_name("dry-run")),  # a service knows a run by its name
            "loader": config.loader.model_copy(update={"shard_cache_dir": None, "prefetch_steps": 0}),
            "max_failures": 0,
        }
    )


def _rows(config: TrainConfig, found: DryRun) -> list[tuple[str, str]]:
    encoder, predictor = (found.num_parameters[part] / 1e6 for part in ("encoder", "predictor"))
    clips, view = config.steps * config.batch_size, config.view
    grid = "x".join(map(str, token_grid(view, config.encoder)))
    losses = ", then ".join(f"{loss:.4f}" for loss in found.losses)
    rows = [
        ("run", f"{config.objective}, {config.steps:,} steps of {config.batch_size:,} clips"),
        (
            "model",
            f"{name_of_size(config.encoder)}: encoder of {encoder:,.2f} M weights, predictor of"
            f" {predictor:,.2f} M",
        ),
        ("device", f"{found.world_size} worker(s) on {found.device}, {found.precision}"),
        (
            "clips",
            f"{config.data}: {found.num_samples:,} samples of split {config.split!r}, seen"
            f" {clips / found.num_samples:,.1f} times; {view.num_frames} frames of {view.size_text} pixels,"
            f" {grid} tokens; decoded by {found.decoder}",
        ),
    ]
    if isinstance(config, StudentRun):
        for number, teacher in enumerate(found.teachers):
            share = config.loss_shares[number]
            of_several = f", {share:.0%} of the loss" if len(found.teachers) > 1 else ""
            rows += [("targets", f"from {source_order(config, number)}{of_several}"), ("teacher", teacher)]
        for cache in config.cache:
            rows.append(("cache", f"{cache} was neither read nor written"))
    rows += [
        ("loss", f"{losses}; {found.num_bad} clips could not be decoded"),
        (
            "step",
            f"{duration(found.step_s)}: {duration(found.read_s)} to read its clips, and beside that"
            f" {duration(found.teacher_wait_s)} until targets come, {duration(found.compute_s)} for the rest",
        ),
        ("whole run", f"{duration(config.steps * found.step_s)} at that speed"),
        ("memory", f"{found.peak_bytes / 1e9:.2f} GB of a worker at the peak"),
        ("out", _refusal(config) or f"{config.out}: free, nothing was written"),
    ]
    return rows


def _described(teacher: TeacherSpec) -> str:
    compute = ", ".join(f"{name} {value}" for name, value in teacher.compute.items())
    return f"{teacher.fingerprint[:12]} of width {teacher.width}: {compute}"


def _refusal(config: TrainConfig) -> str | None:
    """Why the run itself would not start where it is to be written; None where it would."""
    try:
        check_run(config)
    except ValueError as error:
        return f"the run itself will be refused: {error}"
    return None
