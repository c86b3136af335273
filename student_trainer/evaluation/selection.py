"""What `salt-eval select` found: a number of every checkpoint, the accuracy of those that were probed, and
the line through these."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from salt_distill.student_trainer.evaluation.records import Record

Measure = Literal["student-loss", "student-rankme", "teacher-loss", "rankme"]
NAMES: dict[Measure, str] = {
    "student-loss": "held-out loss",
    "student-rankme": "RankMe",
    "teacher-loss": "the teacher's held-out loss",
    "rankme": "the teacher's RankMe",
}
"""What is held against accuracy, for people."""
_FROM_THE_TEACHER = (
    "The number is the teacher's, the accuracy its students': the paper finds that the one does not tell the"
    " other."
)
WHAT_IT_SAYS: dict[Measure, str] = {
    "student-loss": (
        "A frozen teacher's targets do not move, so the losses of its students may be compared with each"
        " other."
    ),
    "student-rankme": (
        "RankMe is of the student's own features, of students of one teacher (arXiv:2509.24317, Figure 10)."
    ),
    "teacher-loss": _FROM_THE_TEACHER,
    "rankme": _FROM_THE_TEACHER,
}
"""Why it may say something about accuracy, or not."""
MORE_IS_BETTER = ("rankme", "student-rankme")
FEWEST = 3
"""Probed checkpoints, each at another place, that make a line with something left over."""


@dataclass(frozen=True, kw_only=True)
class FittedLine:
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


def num_places(xs: Sequence[float]) -> int:
    """How many different values these are. Equal weights that were scored twice differ in the last digits at
    most."""
    x = np.sort(np.array(xs, np.float64))
    return 1 + int((np.diff(x) > 1e-6 * np.abs(x).max()).sum()) if len(x) else 0


def fit(xs: Sequence[float], accuracies: Sequence[float]) -> FittedLine | None:
    """The line through probed checkpoints; None where they lie at fewer than three places: a line through
    two says nothing about a third."""
    x, y = np.array(xs, np.float64), np.array(accuracies, np.float64)
    if num_places(xs) < FEWEST:
        return None
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean() - slope * x.mean())
    residual = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    return FittedLine(
        intercept=intercept,
        slope=slope,
        r2=1 - residual / total if total else 0.0,
        num_points=len(x),
        residual=math.sqrt(residual / (len(x) - 2)),
        mean_x=float(x.mean()),
        spread_x=spread,
    )


class Prediction(Record):
    """What the line says of a checkpoint."""

    accuracy: float
    low: float
    """Lower end of the interval in which 95% of new points would lie."""
    high: float


class MeasuredCheckpoint(Record):
    """A checkpoint."""

    name: str
    """The run's, with the checkpoint's where it is not the newest."""
    fingerprint: str
    """Of its encoder: what its accuracy was found by."""
    x: float
    """What is held against its accuracy."""
    accuracy: float | None
    """None where it was not probed."""
    not_measured: str | None = None
    """Why there is no accuracy."""
    predicted: Prediction | None = None
    """None without a line."""

    @property
    def run(self) -> str:
        """The name of its run."""
        return self.name.partition("/")[0]


class SelectResults(Record):
    """``select.json``: what may stand in one line."""

    writer: ClassVar[str] = "salt-eval select"

    by: Measure
    split: str
    """Of the clips that ``x`` is of."""
    index_hash: str
    """Of the data set of these clips."""
    label: str | None
    """Whose accuracy is meant; None where nothing was probed."""
    probe_index_hash: str | None
    """Of the data set that was probed on."""
    r2: float | None
    """None without a line, as slope and intercept."""
    slope: float | None
    intercept: float | None
    num_probed: int
    checkpoints: tuple[MeasuredCheckpoint, ...]

    @classmethod
    def of(
        cls,
        checkpoints: Sequence[MeasuredCheckpoint],
        *,
        by: Measure,
        split: str,
        index_hash: str,
        label: str | None,
        probe_index_hash: str | None,
    ) -> "SelectResults":
        """With the line through the checkpoints that were probed, and what it says of all."""
        line = _line(checkpoints)
        if line is not None:
            checkpoints = [
                checkpoint.model_copy(update={"predicted": _prediction(line, checkpoint.x)})
                for checkpoint in checkpoints
            ]
        return cls(
            by=by,
            split=split,
            index_hash=index_hash,
            label=label,
            probe_index_hash=probe_index_hash,
            r2=None if line is None else line.r2,
            slope=None if line is None else line.slope,
            intercept=None if line is None else line.intercept,
            num_probed=sum(checkpoint.accuracy is not None for checkpoint in checkpoints),
            checkpoints=tuple(checkpoints),
        )

    @property
    def line(self) -> FittedLine | None:
        """Through the checkpoints that were probed."""
        return _line(self.checkpoints)

    @property
    def in_order(self) -> list[MeasuredCheckpoint]:
        """The most promising first, as the paper reads the number."""
        return sorted(self.checkpoints, key=lambda row: row.x, reverse=self.by in MORE_IS_BETTER)

    @property
    def verdict(self) -> str:
        """What the line is worth, in a sentence."""
        line = self.line
        if line is None:
            return f"R\u00b2 needs {FEWEST} probed checkpoints (--probe), each at another {NAMES[self.by]}"
        return (
            f"R\u00b2 {line.r2:.3f} of {line.num_points} probed checkpoints; predictions with 95% intervals"
            " for new points"
        )


def _line(checkpoints: Sequence[MeasuredCheckpoint]) -> FittedLine | None:
    probed = [(row.x, row.accuracy) for row in checkpoints if row.accuracy is not None]
    return fit([x for x, _ in probed], [accuracy for _, accuracy in probed])


def _prediction(line: FittedLine, x: float) -> Prediction:
    accuracy, low, high = line.predict(x)
    return Prediction(accuracy=accuracy, low=low, high=high)
