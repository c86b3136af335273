"""How many clips a probe named right, and which classes it took for which."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """What was right, of some clips."""

    num_correct: int
    num_clips: int

    @property
    def accuracy(self) -> float:
        """Share of clips classified right."""
        return self.num_correct / self.num_clips

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy."""
        z, n, p = 1.96, self.num_clips, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


def confusion(
    predicted: Int[Tensor, " b"], label: Int[Tensor, " b"], num_classes: int
) -> Int[Tensor, "classes classes"]:
    """How many clips of each class, a row, were taken for each, a column."""
    return torch.bincount(label * num_classes + predicted, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )


def score_of(counts: Int[Tensor, "classes classes"]) -> Score:
    """Of all clips of a confusion matrix."""
    return Score(num_correct=int(counts.trace()), num_clips=int(counts.sum()))


def vote(logits: Float[Tensor, "b v classes"]) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """The class with the highest probability, averaged over a clip's views, and that probability."""
    probability, predicted = logits.float().softmax(-1).mean(1).max(-1)
    return predicted, probability
