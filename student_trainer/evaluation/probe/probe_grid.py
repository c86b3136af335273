"""Training a grid of probes on frozen tokens: every label with every setting, in one pass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import JsonValue
from torch import Tensor

from salt_distill.common.config import ViewConfig
from salt_distill.common.draws import uniforms, words
from salt_distill.common.model.checkpoint import disk_errors
from salt_distill.common.whole import whole_file
from salt_distill.student_trainer.evaluation.probe.attentive import AttentiveProbe
from salt_distill.student_trainer.evaluation.probe.features import TokenSource, in_batches
from salt_distill.student_trainer.evaluation.probe.score import confusion, vote
from salt_distill.student_trainer.evaluation.records import Record
from salt_distill.student_trainer.ranks import Worker

CLIP_NORM = 1.0
"""Of V-JEPA's probe."""
FINAL_WEIGHT_DECAY = 1e-6
"""Of V-JEPA's probe at its last step: the default of its code, which no configuration sets."""
OptimizerName = Literal["vjepa2", "vjepa"]


class ProbeSetting(NamedTuple):
    """What a grid is a grid of."""

    lr: float
    """That a cosine takes to 0."""
    weight_decay: float
    """Of AdamW."""


@dataclass(frozen=True, kw_only=True)
class ExaminedProbe:
    """What a probe says of the clips of a split."""

    counts: Int[Tensor, "classes classes"]
    """Clips of each class, a row, taken for each, a column."""
    numbers: Int[np.ndarray, " k"]
    """Of the clips, among those that have tokens; ascending."""
    predicted: Int[Tensor, " k"]
    """Class of each."""
    probability: Float[Tensor, " k"]
    """That the probe gives this class."""


class ProbeIdentity(Record):
    """What the probes of an encoder depend on."""

    fingerprint: str
    """Of the encoder."""
    index_hash: str
    """Of the data set."""
    view: ViewConfig
    compute: dict[str, str]
    """Device kind, precision and versions of forward and probe."""
    settings: dict[str, JsonValue]
    """Of `ProbeConfig`, as JSON: those that change a probe."""

    def flat(self) -> dict[str, JsonValue]:
        """As plain values, each setting by its own name."""
        values = self.model_dump(mode="json")
        return values | values.pop("settings")


class ProbeGrid:
    """Probes that read the same tokens: AdamW, cosine to 0, no warm-up; decay and clipping are V-JEPA 2's or
    V-JEPA's.

    A probe shares nothing with its neighbours: its weights start from (seed, label), it has its own
    optimizer, and the order of the clips comes from the seed alone. So a label's probe of one setting is the
    same whichever other labels and settings are there. Every rank has all probes and calls all methods; a
    step is of the global batch, whatever part of it each rank has, so the number of ranks changes rounding
    alone.
    """

    def __init__(
        self,
        num_classes: Mapping[str, int],
        settings: list[ProbeSetting],
        *,
        width: int,
        num_heads: int,
        depth: int,
        epochs: int,
        batch_size: int,
        micro_batch_size: int | None,
        seed: int,
        optimizer: OptimizerName = "vjepa2",
        worker: Worker,
        bfloat16: bool,
    ) -> None:
        self.epoch = 0
        """Passes behind it."""
        self.epochs = epochs
        self._batch_size, self._micro_batch_size, self._seed = (
            batch_size,
            micro_batch_size or batch_size,
            seed,
        )
        self._worker, self._device, self._bfloat16 = worker, worker.device, bfloat16
        self._num_classes = num_classes
        self._optimizer_name: OptimizerName = optimizer
        self.probes: dict[tuple[str, ProbeSetting], AttentiveProbe] = {}
        self._optimizers: dict[tuple[str, ProbeSetting], torch.optim.Optimizer] = {}
        for label, count in num_classes.items():
            for setting in settings:
                probe = AttentiveProbe(width, num_heads, count, depth).to(worker.device)
                probe.init_weights(
                    torch.Generator(worker.device).manual_seed(
                        int(words(seed, f"probe {label}", 0, 1)[0] >> np.uint64(1))
                    )
                )
                self.probes[label, setting] = probe
                self._optimizers[label, setting] = torch.optim.AdamW(
                    _groups(probe, optimizer), lr=setting.lr, weight_decay=setting.weight_decay, fused=True
                )

    def train_epoch(self, tokens: TokenSource, labels: Mapping[str, Int[np.ndarray, " k"]]) -> None:
        """One pass over the clips; ``labels``: the class numbers of those that ``tokens`` keeps."""
        num_clips = int(tokens.kept.sum())
        classes = {name: torch.from_numpy(label).to(self._device) for name, label in labels.items()}
        order = np.argsort(uniforms(self._seed, "probe order", self.epoch, num_clips), kind="stable")
        shares = [tokens.share(numbers) for numbers in in_batches(order, self._batch_size)]
        steps = [in_batches(share, self._micro_batch_size) for share in shares]
        batches = tokens.batches([part for parts in steps for part in parts], self.epoch)
        for step, parts in enumerate(steps, start=1 + self.epoch * len(steps)):
            for (_, setting), optimizer in self._optimizers.items():
                lr, weight_decay = rates(self._optimizer_name, setting, step / (self.epochs * len(steps)))
                for group in optimizer.param_groups:
                    group["lr"] = lr
                    group["weight_decay"] = weight_decay if group["decays"] else 0.0
                optimizer.zero_grad()
            num_good = 0
            for _ in parts:
                numbers, batch = next(batches)
                if len(numbers):
                    self._backward(batch, {name: label[numbers] for name, label in classes.items()})
                num_good += len(numbers)
            for name, optimizer in self._optimizers.items():
                self._average(self.probes[name], num_good)
                if self._optimizer_name == "vjepa":
                    torch.nn.utils.clip_grad_norm_(self.probes[name].parameters(), CLIP_NORM)
                optimizer.step()
        self.epoch += 1

    def _backward(self, batch: Float[Tensor, "b 1 n e"], classes: Mapping[str, Int[Tensor, " b"]]) -> None:
        """Adds the gradients of the clips' losses."""
        for (label, _), probe in self.probes.items():
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
                logits = probe(batch.squeeze(1))
            F.cross_entropy(logits.float(), classes[label], reduction="sum").backward()

    def _average(self, probe: AttentiveProbe, num_good: int) -> None:
        """Makes the gradients those of the mean loss over the global batch; ``num_good``: this rank's clips,
        without those that proved bad."""
        parameters = list(probe.parameters())
        gradients = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in parameters
        ]
        together = torch.cat(
            [
                torch.tensor([float(num_good)], device=self._device),
                *(gradient.flatten() for gradient in gradients),
            ]
        )
        count, means = self._worker.sum(together).split([1, len(together) - 1])
        means /= count.clamp(min=1)
        sizes = [weight.numel() for weight in parameters]
        for weight, mean in zip(parameters, means.split(sizes), strict=True):
            weight.grad = mean.view_as(weight)

    @torch.no_grad()
    def examine(
        self, tokens: TokenSource, labels: Mapping[str, Int[np.ndarray, " k"]], batch_size: int
    ) -> dict[tuple[str, ProbeSetting], ExaminedProbe]:
        """What each probe says of every clip, the same on all ranks; the probabilities of a clip's views are
        averaged."""
        answers: dict[tuple[str, ProbeSetting], list[tuple[Tensor, Tensor]]] = {
            name: [] for name in self.probes
        }
        asked: list[Int[np.ndarray, " b"]] = []
        share = tokens.share(np.arange(int(tokens.kept.sum())))
        for numbers, batch in tokens.batches(in_batches(share, batch_size), 0):
            if len(numbers) == 0:
                continue
            asked.append(numbers)
            for name, probe in self.probes.items():
                with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
                    logits = probe(batch.flatten(0, 1)).unflatten(0, batch.shape[:2])
                predicted, probability = vote(logits)
                answers[name].append((predicted.cpu(), probability.cpu()))
        numbers = np.concatenate(
            self._worker.ranks.all_values(np.concatenate([np.zeros(0, np.int64), *asked]))
        )
        return {
            name: self._examined(name[0], numbers, self._gathered(parts), labels[name[0]])
            for name, parts in answers.items()
        }

    def _gathered(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The classes and probabilities of all ranks, one after the other."""
        empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        together = tuple(torch.cat(column) for column in zip(empty, *parts, strict=True))
        ranks = self._worker.ranks.all_values(together)
        return torch.cat([classes for classes, _ in ranks]), torch.cat([shares for _, shares in ranks])

    def _examined(
        self,
        label: str,
        numbers: Int[np.ndarray, " k"],
        answers: tuple[Tensor, Tensor],
        classes: Int[np.ndarray, " k"],
    ) -> ExaminedProbe:
        order = np.argsort(numbers)
        predicted, probability = (part[order] for part in answers)
        actual = torch.from_numpy(classes[numbers[order]])
        return ExaminedProbe(
            counts=confusion(predicted, actual, self._num_classes[label]),
            numbers=numbers[order],
            predicted=predicted,
            probability=probability,
        )

    def save(self, path: Path, identity: ProbeIdentity) -> None:
        """Writes what ``load`` continues from, on rank 0; it appears whole."""
        if self._worker.rank > 0:
            return
        state = {
            "identity": identity.flat(),
            "epoch": self.epoch,
            "probes": [probe.state_dict() for probe in self.probes.values()],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers.values()],
        }
        # Many writers: a killed probe's workers may outlive it by a moment.
        with whole_file(path, synced=False, many_writers=True) as partial, disk_errors(path):
            torch.save(state, partial)

    def load(self, path: Path, identity: ProbeIdentity) -> None:
        """Goes on after the last epoch that was saved. Raises ValueError where that was another probe."""
        state = torch.load(path, map_location=self._device, weights_only=True)
        before = state["identity"]
        for name, value in identity.flat().items():
            if before.get(name) != value:
                raise ValueError(
                    f"--resume: got {name}={value!r}, expected {before.get(name)!r} as in {path}: a probe"
                    " goes on as it began; leave out --resume to begin anew"
                )
        for probe, values in zip(self.probes.values(), state["probes"], strict=True):
            probe.load_state_dict(values)
        for optimizer, values in zip(self._optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.epoch = state["epoch"]


def rates(optimizer: OptimizerName, setting: ProbeSetting, progress: float) -> tuple[float, float]:
    """Learning rate and weight decay of an update; ``progress``: the updates up to it, as a share of all."""
    fall = 0.5 * (1 + math.cos(math.pi * progress))
    if optimizer == "vjepa2":
        return setting.lr * fall, setting.weight_decay
    final = min(FINAL_WEIGHT_DECAY, setting.weight_decay)
    return setting.lr * fall, final + (setting.weight_decay - final) * fall


def _groups(probe: AttentiveProbe, optimizer: OptimizerName) -> list[dict[str, Any]]:
    """The parameters, apart where biases and norms do not decay. The query decays, as it does in V-JEPA."""
    if optimizer == "vjepa2":
        return [{"params": list(probe.parameters()), "decays": True}]
    decaying, others = [], []
    for name, weight in probe.named_parameters():
        (decaying if weight.ndim > 1 or name == "query" else others).append(weight)
    return [{"params": decaying, "decays": True}, {"params": others, "decays": False}]
