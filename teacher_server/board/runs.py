"""A student run as the board knows it: its progress, its curve in a bounded number of points, what it was
sent."""

import time
from dataclasses import dataclass, field

from pydantic import BaseModel, JsonValue

from salt_distill.common.protocol import CurvePoints, Progress, RunState, RunStatus

MAX_POINTS = 400
"""Most points of a run's curve, an even number: enough for every column of a chart."""


LOST_S = 120.0
"""A run that trains and was silent for so long is lost."""


class Point(BaseModel):
    """The mean loss of neighbouring reports, at the last one's step and FLOPs."""

    step: int
    flops: float | None
    loss: float


class Curve(BaseModel):
    """A run's loss in fewer than ``MAX_POINTS`` points, however long it is: where there are as many, each two
    become one."""

    stride: int = 1
    """Reports in a point."""
    points: list[Point] = []
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
        self.begun, self.num_begun = Point(step=step, flops=flops, loss=mean), self.num_begun + 1
        if self.num_begun == self.stride:
            self.points.append(self.begun)
            self.begun, self.num_begun = None, 0
        if len(self.points) == MAX_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [
                Point(step=second.step, flops=second.flops, loss=(first.loss + second.loss) / 2)
                for first, second in pairs
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


class RunLine(BaseModel):
    """A line of the board's file about a run: what it was sent so far, and one report, or everything."""

    run: str
    clips_served: int
    clips_computed: int
    clips_shared: int = 0
    """Missing in older files."""
    bytes_out: int
    seen_s: float
    progress: Progress | None = None
    """The report, or with ``curve`` the newest one."""
    config: dict[str, JsonValue] | None = None
    curve: Curve | None = None
    """With it the line is everything."""
    val_curve: Curve | None = None
    """Beside it; None also in older files."""


@dataclass
class Run:
    """What is known of a student run."""

    clips_served: int = 0
    clips_computed: int = 0
    """Clips that this run caused the forward of."""
    clips_shared: int = 0
    """Targets from work that another run had asked for."""
    bytes_out: int = 0
    seen_s: float = 0.0
    """When it was heard of last, in seconds since 1970."""
    progress: RunState | None = None
    config: dict[str, JsonValue] | None = None
    curve: Curve = field(default_factory=Curve)
    val_curve: Curve = field(default_factory=Curve)
    """Of the loss on held-out clips."""
    token: str = ""
    """Whose run it is: of the token that was heard last."""

    def post(self, progress: Progress) -> None:
        """Takes a worker's report in. What is shown of the run is the first one's."""
        if progress.worker != 0:
            return
        self.config = self.config if progress.config is None else progress.config
        self.progress = _without_config(progress)
        if progress.loss is not None:
            self.curve.add(progress.step, progress.flops, progress.loss)
        if progress.val_loss is not None and progress.val_step is not None:
            # Each report has the newest one; compute grows with the steps.
            flops = progress.flops and progress.flops * progress.val_step / max(1, progress.step)
            self.val_curve.add(progress.val_step, flops, progress.val_loss)

    @property
    def status(self) -> RunStatus:
        """Whether it trains, has ended, or is lost."""
        activity = "running" if self.progress is None else self.progress.activity
        is_silent = time.time() - self.seen_s > LOST_S
        return "lost" if activity == "running" and is_silent else activity

    @property
    def left_s(self) -> float | None:
        """Seconds to its last step at the speed of its last report."""
        state = self.progress
        if self.status != "running" or state is None or state.num_steps is None or state.step_ms is None:
            return None
        return max(0, state.num_steps - state.step) * state.step_ms / 1000

    def line(self, name: str, report: Progress) -> RunLine:
        """What the board's file says of a report."""
        return self._line(name, report)

    def whole_line(self, name: str) -> RunLine:
        """Everything that the board's file keeps of the run."""
        report = None if self.progress is None else Progress(**dict(self.progress))
        return self._line(name, report).model_copy(
            update={"config": self.config, "curve": self.curve, "val_curve": self.val_curve}
        )

    def read(self, line: RunLine) -> None:
        """Takes a line of the board's file in."""
        self.clips_served, self.clips_computed = line.clips_served, line.clips_computed
        self.clips_shared, self.bytes_out, self.seen_s = line.clips_shared, line.bytes_out, line.seen_s
        if line.curve is not None:
            self.progress = None if line.progress is None else _without_config(line.progress)
            self.config, self.curve, self.val_curve = line.config, line.curve, line.val_curve or Curve()
        elif line.progress is not None:
            self.post(line.progress)

    def _line(self, name: str, report: Progress | None) -> RunLine:
        return RunLine(
            run=name,
            clips_served=self.clips_served,
            clips_computed=self.clips_computed,
            clips_shared=self.clips_shared,
            bytes_out=self.bytes_out,
            seen_s=self.seen_s,
            progress=report,
        )


def _without_config(report: Progress) -> RunState:
    return RunState(**report.model_dump(exclude={"config"}))
