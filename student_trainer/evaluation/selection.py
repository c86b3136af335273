"""What `salt-eval select` found: a number of every checkpoint, the accuracy of those that were probed, and
the line through these."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NAMES = {
    "student-loss": "held-out loss",
    "teacher-loss": "the teacher's held-out loss",
    "rankme": "the teacher's RankMe",
}
"""What is held against accuracy, for people."""
FEWEST = 3
"""Probed checkpoints that make a line with something left over."""


@dataclass(frozen=True, kw_only=True)
class Line:
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


def fit(xs: Sequence[float], accuracies: Sequence[float]) -> Line | None:
    """The line through probed checkpoints; None where they are fewer than three, or at one place."""
    x, y = np.array(xs, np.float64), np.array(accuracies, np.float64)
    if len(x) < FEWEST or not np.ptp(x):
        return None
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean() - slope * x.mean())
    left = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    return Line(
        intercept=intercept,
        slope=slope,
        r2=1 - left / total if total else 0.0,
        num_points=len(x),
        residual=math.sqrt(left / (len(x) - 2)),
        mean_x=float(x.mean()),
        spread_x=spread,
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A checkpoint."""

    name: str
    """As in `salt-eval probe`'s table."""
    x: float
    """What is held against its accuracy."""
    accuracy: float | None
    """None where it was not probed."""

    @property
    def run(self) -> str:
        """The name of its run."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What may stand in one line."""

    by: str
    """A key of NAMES."""
    split: str
    """Of the clips that ``x`` is of."""
    label: str | None
    """Whose accuracy is meant; None where nothing was probed."""
    points: Sequence[Measured]
    line: Line | None

    @classmethod
    def of(cls, *, by: str, split: str, label: str | None, points: Sequence[Measured]) -> "Selection":
        """With the line through those of the points that were probed."""
        probed = [(point.x, point.accuracy) for point in points if point.accuracy is not None]
        line = fit([x for x, _ in probed], [accuracy for _, accuracy in probed])
        return cls(by=by, split=split, label=label, points=points, line=line)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Selection":
        """What `salt-eval select` wrote. Raises ValueError where it is something else."""
        try:
            points = [
                Measured(name=row["name"], x=row["x"], accuracy=row["accuracy"])
                for row in found["checkpoints"]
            ]
            return cls.of(by=found["by"], split=found["split"], label=found["label"], points=points)
        except KeyError as error:
            raise ValueError(
                f"select.json: got no {error}, expected what `salt-eval select` of this version writes: run"
                " it again"
            ) from None

    def as_json(self) -> dict[str, Any]:
        """For other programs: with what the line says of each checkpoint."""
        line = self.line
        rows: list[dict[str, Any]] = []
        for point in self.points:
            predicted = (
                None
                if line is None
                else dict(zip(("accuracy", "low", "high"), line.predict(point.x), strict=True))
            )
            rows.append(
                {"name": point.name, "x": point.x, "accuracy": point.accuracy, "predicted": predicted}
            )
        return {
            "by": self.by,
            "split": self.split,
            "label": self.label,
            "r2": None if line is None else line.r2,
            "num_probed": sum(point.accuracy is not None for point in self.points),
            "slope": None if line is None else line.slope,
            "intercept": None if line is None else line.intercept,
            "checkpoints": rows,
        }

    @property
    def in_order(self) -> list[Measured]:
        """The most promising first, as the paper reads the number."""
        return sorted(self.points, key=lambda point: point.x, reverse=self.by == "rankme")

    @property
    def verdict(self) -> str:
        """What the line is worth, in a sentence."""
        if self.line is None:
            return f"R\u00b2 needs {FEWEST} checkpoints with a probe (--probe) at different places"
        return (
            f"R\u00b2 {self.line.r2:.3f} of {self.line.num_points} probed checkpoints; predictions with 95%"
            " intervals for new points"
        )
