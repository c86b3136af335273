"""A student run as the board knows it: its progress, its curve in a bounded number of points, what it was
sent."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from salt_distill.common.protocol import CurvePoints, Progress, RunState

_COUNTS = ("clips_served", "clips_computed", "bytes_out", "seen_s")
MAX_POINTS = 400
"""Most points of a run's curve, an even number: enough for every column of a chart."""


@dataclass
class Point:
    """The mean loss of neighbouring reports, at the last one's step and FLOPs."""

    step: int
    flops: float | None
    loss: float


@dataclass
class Curve:
    """A run's loss in fewer than ``MAX_POINTS`` points, however long it is: where there are as many, each two
    become one."""

    stride: int = 1
    """Reports in a point."""
    points: list[Point] = field(default_factory=list)
    begun: Point | None = None
    """The point to come: the mean so far."""
    num_begun: int = 0
    """Reports in it."""

    def add(self, step: int, flops: float | None, loss: float) -> None:
        """Takes a report in. A step that is there already changes nothing; after an earlier one the run goes
        on from there, as one that was resumed."""
        last = self.begun or (self.points[-1] if self.points else None)
        if last is not None and step == last.step:
            return
        if last is not None and step < last.step:
            self.points = [point for point in self.points if point.step < step]
            self.begun, self.num_begun = None, 0
        mean = (
            loss if self.begun is None else self.begun.loss + (loss - self.begun.loss) / (self.num_begun + 1)
        )
        self.begun, self.num_begun = Point(step, flops, mean), self.num_begun + 1
        if self.num_begun == self.stride:
            self.points.append(self.begun)
            self.begun, self.num_begun = None, 0
        if len(self.points) == MAX_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [
                Point(second.step, second.flops, (first.loss + second.loss) / 2) for first, second in pairs
            ]
            self.stride *= 2

    def shown(self) -> CurvePoints:
        """The points, the one to come last."""
        points = [*self.points, *([] if self.begun is None else [self.begun])]
        return CurvePoints(
            step=[point.step for point in points],
            flops=[point.flops for point in points],
            loss=[point.loss for point in points],
        )

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The curve in ``to_json``'s form."""
        begun = values["begun"]
        return cls(
            **{
                **values,
                "points": [Point(**point) for point in values["points"]],
                "begun": None if begun is None else Point(**begun),
            }
        )


@dataclass
class Run:
    """What is known of a student run."""

    clips_served: int = 0
    clips_computed: int = 0
    """Clips that this run caused the forward of."""
    bytes_out: int = 0
    seen_s: float = 0.0
    """When it was heard of last, in seconds since 1970."""
    progress: RunState | None = None
    config: dict[str, Any] | None = None
    curve: Curve = field(default_factory=Curve)
    token: str = ""
    """Whose run it is: of the token that was heard last."""

    def post(self, progress: Progress) -> None:
        """Takes a worker's report in. What is shown of the run is the first one's."""
        if progress.worker != 0:
            return
        self.config = self.config if progress.config is None else progress.config
        self.progress = RunState.model_validate(progress.model_dump(exclude={"config"}))
        if progress.loss is not None:
            self.curve.add(progress.step, progress.flops, progress.loss)

    def counts(self) -> dict[str, int | float]:
        """What it was sent, and when it was heard of."""
        return {name: getattr(self, name) for name in _COUNTS}

    def line(self, report: Progress) -> dict[str, Any]:
        """What the board's file says of a report."""
        return {**self.counts(), "progress": report.model_dump(exclude_none=True)}

    def to_json(self) -> dict[str, Any]:
        """Everything that the board's file keeps of the run."""
        return {
            **self.counts(),
            "progress": None if self.progress is None else self.progress.model_dump(),
            "config": self.config,
            "curve": self.curve.to_json(),
        }

    def read(self, values: dict[str, Any]) -> None:
        """Takes a line of the board's file in, of either kind."""
        for name in _COUNTS:
            setattr(self, name, values[name])
        progress = None if values["progress"] is None else Progress.model_validate(values["progress"])
        if "curve" in values:
            self.progress, self.config, self.curve = (
                None
                if progress is None
                else RunState.model_validate(progress.model_dump(exclude={"config"})),
                values["config"],
                Curve.from_json(values["curve"]),
            )
        elif progress is not None:
            self.post(progress)
