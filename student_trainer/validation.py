"""The held-out loss of a run while it trains, and the best of its steps by it."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from salt_distill.common.config import StudentRun, TrainConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.compute import uses_bfloat16, wait_for
from salt_distill.common.model.flops import FORWARD_FLOPS, TRAIN_FLOPS, num_parameters, six_n_d
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.pixels import normalise
from salt_distill.student_trainer.evaluation.held_out import clip_losses
from salt_distill.student_trainer.evaluation.rank import knn, rankme
from salt_distill.student_trainer.held_out_clips import HeldOutClips, read_held_out
from salt_distill.student_trainer.objective import Objective, modules_of, weighted_mean
from salt_distill.student_trainer.parallel import num_passes
from salt_distill.student_trainer.predicted_accuracy import AccuracyLine, read_accuracy_line
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.resume import Position
from salt_distill.student_trainer.targets.source import TargetSource

_NUM_NEIGHBOURS = 10
"""That name a clip."""


class Best(NamedTuple):
    """What the measurements of a run have come to so far."""

    step: int = 0
    """Of the least loss; 0 before there is one."""
    loss: float = math.inf
    num_without_gain: int = 0
    """Measurements since then."""

    def after(self, step: int, loss: float) -> "Best":
        """With one more."""
        return (
            Best(step, loss)
            if loss < self.loss
            else self._replace(num_without_gain=self.num_without_gain + 1)
        )

    @property
    def plain(self) -> tuple[int, float, int]:
        """As a checkpoint holds it."""
        return self.step, self.loss, self.num_without_gain


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was found after a step."""

    values: dict[str, float]
    """As a line of metrics names them."""
    seconds: float
    """That it took."""
    is_best: bool


class Validation:
    """Measures a run on its held-out clips every ``val_every`` steps; without that, never. Every rank has
    one, and calls its methods in the same order; each measures its share of the clips."""

    def __init__(
        self,
        config: TrainConfig,
        worker: Worker,
        objective: Objective,
        reader: Reader,
        sources: Sequence[TargetSource],
        *,
        start: Position | None,
    ) -> None:
        """Reads the clips, and says what a measurement costs. ``start``: where the run goes on."""
        self.best = Best() if start is None or start.best is None else Best(*start.best)
        self._config, self._worker, self._objective = config, worker, objective
        self._clips: HeldOutClips | None = None
        self._accuracy: AccuracyLine | None = None
        if config.val_every is not None:
            since = time.perf_counter()
            self._clips = read_held_out(config, worker, reader, sources, slot=start.slot if start else 0)
            worker.say(self._sentence(self._clips, reader, time.perf_counter() - since))
        if isinstance(config, StudentRun) and config.predict_from is not None:
            [source] = sources
            self._accuracy = self._line(config, reader, source.spec.fingerprint)

    def after(self, step: int) -> Measurement | None:
        """What there is to say after a step, if anything."""
        config, clips = self._config, self._clips
        if clips is None or not config.val_every or (step % config.val_every and step != config.steps):
            return None
        wait_for(self._worker.device)
        since = time.perf_counter()
        losses = self._losses(clips)
        loss = weighted_mean(losses, config.loss_shares).item()
        values = {"val_loss": loss} | ({} if self._accuracy is None else self._accuracy.at(loss))
        values |= self._features(clips) if config.val_features else {}
        if len(losses) > 1:
            values |= {f"val_loss_teacher{number}": each.item() for number, each in enumerate(losses)}
        seconds = time.perf_counter() - since
        self.best = self.best.after(step, loss)
        if self.ends_run:
            self._worker.say(
                f"{config.out} ends at step {step}: the held-out loss has had no gain in"
                f" {self.best.num_without_gain} measurements, its least is {self.best.loss:.4f} at step"
                f" {self.best.step} (checkpoints/best)"
            )
        return Measurement(
            values=values | {"val_ms": 1000 * seconds}, seconds=seconds, is_best=self.best.step == step
        )

    @property
    def ends_run(self) -> bool:
        """Whether the run had no gain for as long as it may."""
        patience = self._config.stop_after_no_gain
        return patience is not None and self.best.num_without_gain >= patience

    def _line(self, config: StudentRun, reader: Reader, teacher_fingerprint: str) -> AccuracyLine | None:
        """What the held-out loss says of accuracy, or None; says which, and why."""
        line, sentence = self._worker.together(
            lambda: read_accuracy_line(config, reader, teacher_fingerprint)
        )
        self._worker.say(sentence)
        return line

    def _losses(self, clips: HeldOutClips) -> list[Tensor]:
        """The mean over the clips, for each teacher."""
        batch, device = clips.batch, self._worker.device
        passes = num_passes(self._objective, batch, clips.num_clips, self._worker)
        with self._computing():
            losses = clip_losses(self._objective, batch, clips.targets, device, passes)
        return list(self._worker.sum(torch.stack([each.sum() for each in losses])) / clips.num_good)

    @torch.no_grad()
    def _features(self, clips: HeldOutClips) -> dict[str, float]:
        """What the mean of a clip's tokens is worth."""
        batch, encoder = clips.batch, modules_of(self._objective)["model"]
        passes = num_passes(self._objective, batch, clips.num_clips, self._worker)
        with self._computing():
            groups = batch.groups((), self._worker.device, passes)
            means = torch.cat([encoder(normalise(group.pixels)).float().mean(1).cpu() for group in groups])
        good = torch.from_numpy(batch.clips.good)
        features = torch.cat(self._worker.ranks.all_values(means[: len(good)][good]))
        found = {"val_rankme": rankme(features)}
        return (
            found if clips.classes is None else found | {"val_knn": halves_accuracy(features, clips.classes)}
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inside, the model computes as in a step; a sharded one is whole, but for its blocks."""
        device, objective = self._worker.device, self._objective
        bfloat16 = uses_bfloat16(self._config.compute.dtype, device)
        if isinstance(objective, FSDPModule):
            objective.unshard()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            yield
        if isinstance(objective, FSDPModule):
            objective.reshard()

    def _sentence(self, clips: HeldOutClips, reader: Reader, seconds: float) -> str:
        """Which clips these are, and what they cost. Raises ValueError where they are too few."""
        config, held_out, width = self._config, reader.held_out, self._config.encoder.width
        assert held_out is not None, "there are clips"
        if config.val_features and clips.num_good < width:
            raise ValueError(
                f"got --val-features with {clips.num_good} held-out clips for {width} channels, expected at"
                " least as many: RankMe of fewer is their number at most. Raise --val-clips, or leave"
                " --val-features out"
            )
        what = "held-out loss"
        if config.val_features:
            what += ", RankMe" + (f", k-NN of {clips.label}" if clips.label else "")
        where = f"of split {held_out.split!r}"
        if held_out.is_from_training:
            where += f", left out of training, which has {reader.num_samples} samples without them"
        return (
            f"{what} every {config.val_every} steps: {clips.num_good} clips {where}; read in"
            f" {seconds:.1f} s; {clips.num_bytes / 1e6:,.1f} MB of memory, {self._share(clips):.1%} of"
            " the training's compute"
        )

    def _share(self, clips: HeldOutClips) -> float:
        """Compute of the measurements over that of the training, by the paper's rule."""
        config, num_tokens = self._config, token_grid(self._config.view, self._config.encoder).num_tokens
        encoder = num_parameters(self._objective.encoder)
        step = six_n_d(
            num_tokens=num_tokens,
            num_sets=len(config.mask.sets),
            encoder_parameters=encoder,
            predictor_parameters=num_parameters(self._objective.predictor),
            teacher_parameters=0,
        ).total
        clip = step * FORWARD_FLOPS / TRAIN_FLOPS + config.val_features * FORWARD_FLOPS * encoder * num_tokens
        return clip * clips.num_good / (step * config.batch_size * (config.val_every or 1))


def halves_accuracy(features: Float[Tensor, "b e"], classes: Int[Tensor, " b"]) -> float:
    """Share of clips that are named right by their nearest ones of the other half."""
    halves, num_right = [slice(None, None, 2), slice(1, None, 2)], 0
    for known, asked in (halves, halves[::-1]):
        if len(classes[known]) and len(classes[asked]):
            named = knn(
                features[known],
                classes[known],
                features[asked],
                num_classes=int(classes.max()) + 1,
                k=_NUM_NEIGHBOURS,
            )
            num_right += int((named == classes[asked]).sum())
    return num_right / len(classes)
