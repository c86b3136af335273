"""What a run says of itself while it trains: metrics.jsonl, TensorBoard, Prometheus, trackers."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from jaxtyping import Float
from torch import Tensor

from salt_distill.common.config import TrainConfig
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.grid import token_grid
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.event_files import EventFiles
from salt_distill.student_trainer.exporter import Exporter
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.tracker import Tracker
from salt_distill.student_trainer.training_pictures import TrainingPicture
from salt_distill.student_trainer.utilisation import Utilisation


class DivergedError(ValueError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What came of one optimizer step, on the device."""

    loss: Tensor
    """Over all ranks, float64."""
    teacher_losses: Float[Tensor, " teachers"]
    """Over all ranks, float64, where there are several teachers; empty else."""
    norm: Tensor
    """Of the gradient, over all ranks, before clipping."""
    clip_losses: Float[Tensor, " b"]
    """Of this rank's clips; 0 where one is bad."""


@dataclass(kw_only=True)
class _Interval:
    """Sums since the last line; tensors stay on the device, so that a step never waits for it."""

    updates: list[Update] = field(default_factory=list)
    keys: list[tuple[str, ...]] = field(default_factory=list)
    """The samples of each step."""
    data_wait_s: float = 0.0
    teacher_wait_s: float = 0.0
    num_clips: int = 0
    num_visible: int = 0
    num_hidden: int = 0
    started_s: float = field(default_factory=time.perf_counter)


class MetricsLog:
    """Collects every step of this rank; rank 0 writes a line per interval.

    Raises DivergedError at the first interval with a non-finite loss, on every rank.
    """

    def __init__(
        self,
        config: TrainConfig,
        worker: Worker,
        *,
        after_step: int,
        num_bad: int,
        flops_per_step: float,
        utilisation: Utilisation,
    ) -> None:
        """``num_bad``: of the clips until ``after_step``, where the run goes on, those that could not be
        decoded."""
        self._config, self._worker = config, worker
        self._num_tokens = token_grid(config.view, config.encoder).num_tokens
        self._flops_per_step, self._utilisation = flops_per_step, utilisation
        self._interval = _Interval()
        self._num_bad_before, self._num_bad = num_bad, 0
        out = Path(config.out)
        self._file: TextIO | None = None
        self._events: EventFiles | None = None
        if worker.rank == 0:
            self._file = (out / "metrics.jsonl").open("a")
            self._events = EventFiles(config, after_step=after_step)
        self._exporter = (
            Exporter(config.metrics_port) if worker.rank == 0 and config.metrics_port is not None else None
        )
        self._tracker = Tracker(config) if worker.rank == 0 and config.wandb is not None else None

    def add(
        self,
        batch: Batch,
        update: Update,
        *,
        data_wait_s: float,
        teacher_wait_s: float,
        lr: float,
        weight_decay: float,
        other_metrics: dict[str, int | float],
        is_last: bool,
    ) -> MetricsLine | None:
        """Takes one step in; the new line where an interval ends (on every rank), else None.

        ``other_metrics``: what the source of targets, and held-out clips, add to the line.
        """
        interval = self._interval
        interval.updates.append(update)
        interval.keys.append(batch.clips.keys)
        interval.data_wait_s += data_wait_s
        interval.teacher_wait_s += teacher_wait_s
        interval.num_clips += len(batch.clips.good)
        for group in batch.masks:
            interval.num_visible += sum(mask.visible_idx.numel() for mask in group.sets)
            interval.num_hidden += sum(mask.hidden_idx.numel() for mask in group.sets)
        self._num_bad += int((~batch.clips.good).sum())
        if batch.step % self._config.log_every and not is_last:
            return None
        line = self._line(batch.step, lr, weight_decay, other_metrics)
        self._write(line)
        return line

    def show_pictures(self, step: int, pictures: Sequence[TrainingPicture]) -> None:
        """Adds pictures at a step to what shows them."""
        for shown in (self._events, self._tracker):
            if shown is not None and pictures:
                shown.show_pictures(step, pictures)

    def leave_out(self, seconds: float) -> None:
        """Of the time since the last line, ``seconds`` were no step's."""
        self._interval.started_s += seconds

    def num_bad_clips(self) -> int:
        """Clips of the whole run so far that could not be decoded, over all ranks."""
        return self._num_bad_before + sum(self._worker.ranks.all_values(self._num_bad))

    def require_finite(self, step: int) -> None:
        """Raises DivergedError if a step since the last line was left out: before a checkpoint, so that the
        last one is from before it."""
        if self._interval.updates:
            self._losses(self._interval, step)

    def close(self) -> None:
        """Ends the files."""
        if self._events is not None and self._file is not None:
            self._file.close()
            self._events.close()
        if self._exporter is not None:
            self._exporter.close()
        if self._tracker is not None:
            self._tracker.close()

    def _line(
        self, step: int, lr: float, weight_decay: float, other_metrics: dict[str, int | float]
    ) -> MetricsLine:
        """Of the interval that ends with ``step``; a new one begins."""
        interval, self._interval = self._interval, _Interval()
        losses = self._losses(interval, step)
        counts = [interval.num_clips, interval.num_visible, interval.num_hidden, self._num_bad]
        sums = self._worker.sum(torch.tensor(counts, dtype=torch.float64, device=losses.device))
        num_clips, num_visible, num_hidden, num_bad = sums.tolist()
        seconds = time.perf_counter() - interval.started_s
        num_steps = len(interval.updates)
        views_of_tokens = num_clips * self._num_tokens * len(self._config.mask.sets)
        teacher_losses = torch.stack([update.teacher_losses for update in interval.updates]).mean(0).tolist()
        return MetricsLine(
            step=step,
            slot=step * self._config.batch_size,
            loss=losses.mean().item(),
            lr=lr,
            weight_decay=weight_decay,
            grad_norm=torch.stack([update.norm for update in interval.updates]).mean().item(),
            clips_per_s=num_clips / seconds,
            tokens_per_s=num_clips * self._num_tokens / seconds,
            mfu=self._utilisation.mfu(num_clips / seconds),
            teacher_wait_ms=1000 * interval.teacher_wait_s / num_steps,
            data_wait_ms=1000 * interval.data_wait_s / num_steps,
            step_ms=1000 * seconds / num_steps,
            context_fraction=num_visible / views_of_tokens,
            target_fraction=num_hidden / views_of_tokens,
            flops=step * self._flops_per_step,
            bad_clips=self._num_bad_before + int(num_bad),
            **other_metrics,
            **{f"loss_teacher{number}": loss for number, loss in enumerate(teacher_losses)},
        )

    def _write(self, line: MetricsLine) -> None:
        if self._file is None or self._events is None:
            return
        self._file.write(json.dumps(line.values()) + "\n")
        self._file.flush()
        self._events.show(line)
        if self._exporter is not None:
            self._exporter.show(line)
        if self._tracker is not None:
            self._tracker.show(line)

    def _losses(self, interval: _Interval, step: int) -> Float[Tensor, " steps"]:
        """The loss of each step of an interval that ends with ``step``, over all ranks. Raises DivergedError
        where one is not finite, or its gradient."""
        losses = torch.stack([update.loss for update in interval.updates])
        norms = torch.stack([update.norm for update in interval.updates])
        wrong = (~(losses.isfinite() & norms.isfinite())).nonzero()
        if len(wrong) == 0:
            return losses
        first = int(wrong[0])
        lost = (~interval.updates[first].clip_losses.isfinite()).tolist()
        lost_keys = [key for key, is_lost in zip(interval.keys[first], lost, strict=True) if is_lost]
        keys = [key for rank_keys in self._worker.ranks.all_values(lost_keys) for key in rank_keys]
        clips = f"from {len(keys)} clips, {', '.join(keys[:5])}" if keys else "from no clip alone"
        raise DivergedError(
            f"step {step - len(losses) + 1 + first} has loss {losses[first].item():g} and a gradient of norm"
            f" {norms[first].item():g}, expected finite numbers ({clips}): its update was left out, and the"
            " newest checkpoint is from before it. Look at the clips, or start again with a lower optim.lr"
        )
