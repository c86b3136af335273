"""What probes found, as `probe.json` has it, and how it came about in words."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from salt_distill.common.config import ProbeConfig
from salt_distill.student_trainer.evaluation.probe.probe_grid import ProbeSetting
from salt_distill.student_trainer.evaluation.probe.score import Score, score_of
from salt_distill.student_trainer.evaluation.records import EncoderIdentity, Record

TRAIN, VAL, TEST = "train", "val", "test"


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """What the chosen probe of a label does."""

    setting: ProbeSetting
    chosen_by: Score | None
    """Its score on the split that the setting was chosen on; None where there was one setting."""
    counts: Int[Tensor, "classes classes"]
    """Clips of the split that is reported on: of each class, a row, taken for each, a column."""
    predictions: Sequence["ClipPrediction"]
    """Of these clips."""
    weights: dict[str, Tensor]
    """Of the probe, in the host's memory."""

    @property
    def score(self) -> Score:
        """Of all clips."""
        return score_of(self.counts)


@dataclass(frozen=True, kw_only=True)
class ClipPrediction:
    """What a probe says of a clip."""

    key: str
    actual: int
    """Its class."""
    predicted: int
    probability: float
    """That the probe gives the predicted class."""


class LabelFacts(Record):
    """A label of the data set."""

    num_classes: int
    class_names: tuple[str, ...]
    chance: float
    """Accuracy of always naming the training split's most common class, its largest."""
    num_train: int
    """Clips that were learned from."""
    num_test: int
    """Clips of the split that is reported on."""


class ChosenSetting(Record):
    """The setting of the probe that is reported."""

    lr: float
    """Learning rate at the first step."""
    weight_decay: float
    val_accuracy: float | None
    """Accuracy that it was chosen for; none where there was one setting."""


class ProbeResults(Record):
    """``probe.json``. The tables are by encoder, then by label."""

    writer: ClassVar[str] = "salt-eval probe"

    accuracy: dict[str, dict[str, float]]
    """Share of the clips named right."""
    interval: dict[str, dict[str, tuple[float, float]]]
    """95% Wilson interval of the accuracy."""
    num_correct: dict[str, dict[str, int]]
    """Clips named right."""
    setting: dict[str, dict[str, ChosenSetting]]
    encoders: dict[str, EncoderIdentity]
    labels: dict[str, LabelFacts]
    index_hash: str
    """Of the data set that was probed on."""
    reported_on: str
    """Split whose accuracies these are; empty where the clips carry no labels."""
    protocol: str
    """How the accuracies came about, in a sentence."""

    @classmethod
    def of(
        cls,
        results: Mapping[str, Mapping[str, LabelResult]],
        *,
        encoders: Mapping[str, EncoderIdentity],
        labels: Mapping[str, LabelFacts],
        index_hash: str,
        reported_on: str,
        protocol: str,
    ) -> "ProbeResults":
        """From what was found for each encoder and label."""
        scores = {
            name: {label: outcome.score for label, outcome in row.items()} for name, row in results.items()
        }
        return cls(
            accuracy={
                name: {key: score.accuracy for key, score in row.items()} for name, row in scores.items()
            },
            interval={
                name: {key: score.interval for key, score in row.items()} for name, row in scores.items()
            },
            num_correct={
                name: {key: score.num_correct for key, score in row.items()} for name, row in scores.items()
            },
            setting={
                name: {label: _setting(result) for label, result in row.items()}
                for name, row in results.items()
            },
            encoders=dict(encoders),
            labels=dict(labels),
            index_hash=index_hash,
            reported_on=reported_on,
            protocol=protocol,
        )

    def named(self, fingerprint: str, name: str) -> str | None:
        """The row of these weights, the one called ``name`` where several have them; None without one."""
        names = [row for row, encoder in self.encoders.items() if encoder.fingerprint == fingerprint]
        return name if name in names else next(iter(names), None)


def _setting(result: LabelResult) -> ChosenSetting:
    accuracy = None if result.chosen_by is None else result.chosen_by.accuracy
    return ChosenSetting(
        lr=result.setting.lr, weight_decay=result.setting.weight_decay, val_accuracy=accuracy
    )


def reported_on(splits: Sequence[str], num_settings: int, data: str) -> str:
    """The split whose accuracy is reported. Raises ValueError where the probe cannot learn, be chosen or be
    scored honestly."""
    if TRAIN not in splits or not {VAL, TEST} & set(splits):
        known = ", ".join(sorted(splits))
        raise ValueError(
            f"{data}: got splits {known}, expected {TRAIN!r} for the probe to learn on and {TEST!r} (or"
            f" {VAL!r}) to score it on"
        )
    if num_settings > 1 and VAL not in splits:
        raise ValueError(
            f"{data}: got no split {VAL!r}, expected one to choose among {num_settings} settings on: chosen"
            f" on {TEST!r}, their best would say too much. Pack a part of {TRAIN!r} as {VAL!r}, or give one"
            " --lr and one --weight-decay"
        )
    return TEST if TEST in splits else VAL


_CHANGES = {
    "crops": "clips drawn anew in each epoch",
    "video": (
        "clips drawn anew in each epoch with RandAugment m7-n4 and erasing 0.25 (noise clamped to 8-bit"
        " pixels, before normalisation)"
    ),
    "images": (
        "images drawn anew in each epoch, mirrored, with AutoAugment and erasing 0.25 (noise clamped to 8-bit"
        " pixels, before normalisation), resized with antialias"
    ),
}
"""What `augment` does to clips, and where that is not the reference's."""
_OPTIMIZERS = {
    "vjepa2": "AdamW",
    "vjepa": "AdamW clipped at 1, decay of matrices and query alone and falling to 1e-6",
}


def protocol(config: ProbeConfig, split: str) -> str:
    """How the accuracies came about, in a sentence."""
    before = config.depth - 1
    blocks = (
        f"{before} self-attention block{'s' * (before > 1)} and a cross-attention block"
        if before
        else "one cross-attention block"
    )
    clips = (
        f"{config.segments} clip{'s' * (config.segments > 1)} x {config.views} view{'s' * (config.views > 1)}"
    )
    seen = _CHANGES[config.augment_with] if config.augment else "the same clips in each epoch"
    settings = len(config.lr) * len(config.weight_decay)
    if settings == 1:
        choice = f"lr {config.lr[0]:g}, weight decay {config.weight_decay[0]:g}, last epoch, nothing selected"
    elif split == TEST:
        choice = f"last epoch, the best of {settings} settings on {VAL!r}"
    else:
        choice = (
            f"last epoch, the best of {settings} settings on the clips that it is reported on (there is no"
            f" {TEST!r}), so on the high side"
        )
    size = f"{config.epochs} epochs of {config.batch_size} clips a step"
    return f"{blocks}, {clips}, {seen}, {size}, {_OPTIMIZERS[config.optimizer]}, {choice}"


def chosen_label(
    labels: Collection[str], asked: str | None, place: str | Path, *, flag: str = "--label"
) -> str:
    """The label that is meant: the one that was asked for, or the only one. Raises ValueError where none
    is; ``place``: the file that has the labels."""
    if asked is None and len(labels) == 1:
        return next(iter(labels))
    if asked is None or asked not in labels:
        got = f"no {flag}" if asked is None else f"{flag} {asked}"
        raise ValueError(
            f"got {got}, expected one of {', '.join(sorted(labels)) or 'none'}, which {place} has"
        )
    return asked
