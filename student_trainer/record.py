"""What a run leaves in its directory beside its configuration: environment, metrics, checkpoints, summary."""

import json
import os
import platform
import shutil
import subprocess
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter

from salt_distill.common.config import ComputeConfig, TrainConfig
from salt_distill.common.config.base import Several
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import CheckpointConfig, point_to, save_checkpoint
from salt_distill.common.model.compute import matrix_peak, precision
from salt_distill.common.model.flops import num_parameters, step_flops
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.teacher import TeacherSpec, device_kind
from salt_distill.common.termination import taking_time
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.best_checkpoint import best_of, point_to_best
from salt_distill.student_trainer.metrics import MetricsLog, Update
from salt_distill.student_trainer.objective import Objective
from salt_distill.student_trainer.parallel import collect
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.resume import ClipOrder, Position
from salt_distill.student_trainer.run_directory import read_metrics
from salt_distill.student_trainer.storage import Uploads, remove_old
from salt_distill.student_trainer.targets.source import TargetSource
from salt_distill.student_trainer.training_pictures import TrainingPictures
from salt_distill.student_trainer.utilisation import Utilisation
from salt_distill.student_trainer.validation import Measurement, Validation
from salt_distill.student_trainer.vjepa import VJepa


class Environment(ComputeConfig):
    """On what, and how, a run computes from a start on: an entry of ``environment.json``, which has one for
    every start, since a run that is resumed may have moved."""

    after_step: int
    """Optimizer steps done before it."""
    python: str
    torch: str
    platform: str
    num_cpus: int | None
    git_commit: str | None
    """Of this code; None where it is no checkout."""
    world_size: int
    """Workers."""
    device: str
    """Of the first worker."""
    peak_flops_per_s: float
    """Of all workers together, measured."""
    num_threads: int
    """CPU threads of a worker."""
    decoder: str
    """What decodes videos, and its version."""

    @classmethod
    def here(
        cls, config: TrainConfig, worker: Worker, *, decoder: str, after_step: int, peak_flops_per_s: float
    ) -> "Environment":
        """That of this process, for a run."""
        dtype = precision(config.compute.dtype, worker.device)
        return cls(
            **config.compute.model_copy(update={"dtype": dtype}).model_dump(),
            after_step=after_step,
            python=platform.python_version(),
            torch=torch.__version__,
            platform=platform.platform(),
            num_cpus=os.cpu_count(),
            git_commit=git_commit(),
            world_size=worker.world_size,
            device=device_kind(worker.device),
            peak_flops_per_s=peak_flops_per_s,
            num_threads=config.num_threads,
            decoder=decoder,
        )

    def add_to(self, run: Path) -> None:
        """Appends it to the run's ``environment.json``."""
        path = run / "environment.json"
        try:
            starts = _STARTS.validate_json(path.read_bytes()) if path.exists() else []
        except pydantic.ValidationError as error:
            raise ValueError(
                f"{path}: got a damaged file, expected the starts of this run: remove it, and repeat the"
                " command"
            ) from error
        write_whole(path, _STARTS.dump_json([*starts, self.model_dump(mode="json")], indent=2) + b"\n")


_STARTS = TypeAdapter(list[dict[str, Any]])
"""Entries of other versions may have other fields."""


class Summary(BaseModel):
    """``summary.json``: what came of a run. Means are over the lines of ``metrics.jsonl``."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    objective: str
    """vpixel, salt or vjepa."""
    source: Several[str]
    """Where each teacher's targets came from: service, cache or in-process; None where a run makes its
    own."""
    steps: int
    """Done: fewer than were to be where `--stop-after-no-gain` ended the run."""
    ended_early: bool = False
    """`--stop-after-no-gain` ended it."""
    batch_size: int
    loss_first: float
    loss_last: float
    val_loss_best: float | None
    """The least held-out loss; None without `--val-every`."""
    val_step_best: int | None
    """The step that has it: where ``checkpoints/best`` points."""
    flops: float
    """Compute spent, by the paper's 6ND, teacher forward included."""
    teacher_wait_ms: float | None
    """What a step waited for its targets; None without a source."""
    data_wait_ms: float
    """What a step waited for its clips."""
    step_ms: float
    num_parameters: dict[str, int]
    """Of encoder and predictor."""
    teacher: Several[TeacherSpec]
    """The frozen teachers."""
    target_source: Several[dict[str, int | float]]
    """What the source of each teacher's targets counted."""
    decoder: str
    reader: dict[str, int]
    """What the readers of all workers counted."""
    skipped: dict[str, str]
    """Key -> reason, of every video that could not be decoded."""


class RunRecord:
    """What a run leaves while it trains. Every rank makes it and calls its methods in the same order; rank 0
    writes."""

    def __init__(
        self,
        config: TrainConfig,
        worker: Worker,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        checkpoint_config: CheckpointConfig,
        reader: Reader,
        sources: Sequence[TargetSource],
        validation: Validation,
        *,
        start: Position | None,
        checkpoint: Path | None,
    ) -> None:
        """``start``: where the run goes on, from rank 0's ``checkpoint``; None: it begins."""
        self._config, self._worker, self._out = config, worker, Path(config.out)
        self._objective, self._optimizer, self._checkpoint_config = objective, optimizer, checkpoint_config
        self._reader, self._sources, self._validation = reader, sources, validation
        self._step = self._kept_step = 0 if start is None else start.step
        self._kept_s = worker.ranks.clock_s
        self._overtaken = set[Path]()
        peak = sum(worker.ranks.all_values(matrix_peak(worker.device, config.compute.dtype)))
        if worker.rank == 0:
            Environment.here(
                config, worker, decoder=reader.decoder, after_step=self._step, peak_flops_per_s=peak
            ).add_to(self._out)
            if validation.best.step:  # a kill may have come before it
                self._overtaken |= point_to_best(self._out, validation.best.step, config.keep_every)
        self._pictures = TrainingPictures(config, worker, objective, checkpoint_config)
        self._uploads = Uploads(self._out, config.storage if worker.rank == 0 else None)
        if checkpoint is not None:
            self._uploads.add(checkpoint)  # the copy may lag behind
        self._log = MetricsLog(
            config,
            worker,
            after_step=self._step,
            num_bad=0 if start is None else start.bad_clips,
            flops_per_step=self._flops_per_step(),
            utilisation=Utilisation.of(
                config,
                out_width=sum(checkpoint_config.predictor_out_width),
                target_flops=sum(source.clip_flops for source in sources),
                peak_flops_per_s=peak,
            ),
        )

    def add(
        self,
        batch: Batch,
        update: Update,
        *,
        data_wait_s: float,
        teacher_wait_s: float,
        lr: float,
        weight_decay: float,
        measured: Measurement | None,
    ) -> None:
        """Takes a step in, with what was ``measured`` after it: a line of metrics every ``log_every`` steps,
        a checkpoint every ``keep_every`` or ``keep_minutes``, and of the best."""
        self._step = batch.step
        is_last = batch.step == self._config.steps or self._validation.ends_run
        pictures, seconds = self._pictures.after(batch)
        self._log.show_pictures(batch.step, pictures)
        self._log.leave_out(seconds + (0.0 if measured is None else measured.seconds))
        line = self._log.add(
            batch,
            update,
            data_wait_s=data_wait_s,
            teacher_wait_s=teacher_wait_s,
            lr=lr,
            weight_decay=weight_decay,
            other_metrics=dict(ChainMap(*(source.metrics() for source in self._sources)))
            | ({} if measured is None else measured.values),
            is_last=is_last,
        )
        if line is not None and self._worker.rank == 0:
            for number, source in enumerate(self._sources):
                source.report(line.of_teacher(number), is_last=is_last)
        is_best = measured is not None and measured.is_best
        if self._step % self._config.keep_every == 0 or self._is_late() or is_last or is_best:
            self._write_checkpoint(is_best=is_best)

    def is_to_stop(self) -> bool:
        """Whether the run is asked to stop, and has steps that no checkpoint has."""
        return self._step > self._kept_step and self._worker.is_asked_to_stop()

    def stop(self) -> None:
        """Of a run that ends early: a checkpoint of the last step that was added, and its copy."""
        with taking_time():
            if self._step > self._kept_step:
                self._write_checkpoint(is_best=False)
            if self._kept_step:
                self._worker.ranks.result(self._uploads.finish())

    def close(self) -> None:
        """Ends the run's files, with its summary, and waits for their copies."""
        self._log.close()
        ranks = self._worker.ranks
        skipped, counters = ranks.all_values(self._reader.skipped), ranks.all_values(self._reader.counters())
        if self._worker.rank == 0:
            totals = {name: sum(counts[name] for counts in counters) for name in counters[0]}
            summary = self._summary(totals, dict(sorted(ChainMap(*skipped).items())))
            write_whole(self._out / "summary.json", summary.model_dump_json(indent=2) + "\n")
        ranks.result(self._uploads.finish())

    def _is_late(self) -> bool:
        """Whether the newest checkpoint is older than it may be."""
        minutes = self._config.keep_minutes
        return minutes is not None and self._worker.ranks.clock_s - self._kept_s >= 60 * minutes

    def _write_checkpoint(self, *, is_best: bool) -> None:
        """What a run goes on from; every rank takes part."""
        self._log.require_finite(self._step)
        self._worker.ranks.result(self._uploads.failure())
        self._kept_step, self._kept_s = self._step, self._worker.ranks.clock_s
        num_bad = self._log.num_bad_clips()
        state = collect(self._objective, self._optimizer, self._worker)
        if state is None:
            return
        position = Position(
            step=self._step,
            slot=self._step * self._config.batch_size,
            rng=torch.get_rng_state(),
            teacher="\n".join(json.dumps(source.spec.to_json()) for source in self._sources) or None,
            clips=ClipOrder.of(self._config, self._reader).to_json(),
            bad_clips=num_bad,
            best=self._validation.best.plain,
        )
        directory = self._out / "checkpoints" / f"step-{self._step}"
        checkpoint_config = self._checkpoint_config.model_copy(update={"step": self._step})
        save_checkpoint(
            directory, checkpoint_config, state.modules, {"optimizer": state.optimizer, **vars(position)}
        )
        point_to(self._out, directory)
        self._uploads.add(directory)
        if is_best:
            self._overtaken |= point_to_best(self._out, self._step, self._config.keep_every)
        best, kept = best_of(self._out), self._uploads.under_way()
        remove_old(
            self._out,
            self._config.keep_last,
            overtaken=self._overtaken,
            but=kept if best is None else {*kept, best},
        )

    def _flops_per_step(self) -> float:
        teacher_parameters = sum(source.spec.num_parameters for source in self._sources)
        if isinstance(self._objective, VJepa):
            teacher_parameters = num_parameters(self._objective.target_encoder)
        return step_flops(
            num_clips=self._config.batch_size,
            num_tokens=token_grid(self._config.view, self._config.encoder).num_tokens,
            mask=self._config.mask,
            encoder_parameters=num_parameters(self._objective.encoder),
            predictor_parameters=num_parameters(self._objective.predictor),
            teacher_parameters=teacher_parameters,
        )

    def _summary(self, counters: dict[str, int], skipped: dict[str, str]) -> Summary:
        lines, sources, best = read_metrics(self._out), self._sources, self._validation.best
        if not lines:
            raise ValueError(
                f"{self._out}: got no metrics.jsonl, or an empty one, expected the lines that summary.json is"
                " made from: the checkpoints are whole, and --resume with more --steps goes on"
            )

        def mean(name: str) -> float:
            return sum(line[name] for line in lines) / len(lines)

        return Summary(
            objective=self._config.objective,
            source=tuple(source.name for source in sources),
            steps=self._step,
            ended_early=self._validation.ends_run and self._step < self._config.steps,
            batch_size=self._config.batch_size,
            loss_first=lines[0]["loss"],
            loss_last=lines[-1]["loss"],
            val_loss_best=best.loss if best.step else None,
            val_step_best=best.step or None,
            flops=lines[-1]["flops"],
            teacher_wait_ms=mean("teacher_wait_ms") if sources else None,
            data_wait_ms=mean("data_wait_ms"),
            step_ms=mean("step_ms"),
            num_parameters={
                "encoder": num_parameters(self._objective.encoder),
                "predictor": num_parameters(self._objective.predictor),
            },
            teacher=tuple(source.spec for source in sources),
            target_source=tuple(source.counters() for source in sources),
            decoder=self._reader.decoder,
            reader=counters,
            skipped=skipped,
        )


def git_commit() -> str | None:
    """Of this code; None where it is no checkout, or there is no git, as in an image."""
    if shutil.which("git") is None:
        return None
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or None
