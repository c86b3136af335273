"""What the runs of the study say: accuracies by seed, differences with their intervals, costs."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.study.record import Record

LABELS = {
    "digits": ("motion", "digit"),
    "strokes": ("character",),
    "real": ("arrow", "speed", "order", "origin"),
}
"""The labels that claims are about, of each data set."""
RANDOM = "random-init"


class Point(NamedTuple):
    """A checkpoint of a student whose held-out loss was measured."""

    run: str
    step: int
    loss: float
    accuracy: dict[str, float]
    """By label."""


def r2(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Of a straight line; none where all are equal in one of them."""
    try:
        return statistics.correlation(x, y) ** 2
    except statistics.StatisticsError:
        return None


class Difference(NamedTuple):
    """Of two runs, seed by seed, with the 95% interval of its mean (Student's t, n - 1 degrees of freedom);
    none for a single seed."""

    by_seed: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Whether it is above zero."""
        if self.interval is None:
            return "one seed, no verdict"
        if self.interval[0] > 0:
            return "**holds**"
        if self.interval[1] < 0:
            return "**does not hold**"
        return (
            "open: above 0 in each seed, but the interval has 0 in it"
            if min(self.by_seed) > 0
            else "open: the interval has 0 in it"
        )


def difference(better: Mapping[int, float], worse: Mapping[int, float]) -> Difference:
    """Of two runs' accuracies by seed, of the seeds that both have."""
    by_seed = tuple(better[seed] - worse[seed] for seed in better if seed in worse)
    mean = statistics.fmean(by_seed)
    if len(by_seed) < 2:
        return Difference(by_seed, mean, None)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(by_seed) - 1)) * statistics.stdev(by_seed) / math.sqrt(len(by_seed))
    return Difference(by_seed, mean, (mean - half, mean + half))


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The probes that are there, of all seeds that have them."""

    record: Record
    seeds: Sequence[int]

    def probes(self, data: str, experiment: str = "base") -> dict[int, dict[str, Any]]:
        """By seed, what `salt-eval probe` wrote."""
        return self._read(f"{data}/seed-{{}}/{experiment}-probe.json")

    def selections(self) -> dict[int, dict[str, Any]]:
        """By seed, what `salt-eval select` wrote."""
        return self._read("digits/seed-{}/select.json")

    def points(self) -> dict[int, list[Point]]:
        """By seed, the checkpoints of its selection."""
        found: dict[int, list[Point]] = {}
        for seed, selection in self.selections().items():
            probe = self.probes("digits")[seed]
            for row in selection["checkpoints"]:
                run, _, step = row["name"].partition("/step-")
                name = _entry(probe, row["name"])
                assert name is not None
                steps = int(step) if step else self.record[f"digits/seed-{seed}/{run}"].found["steps"]
                point = Point(run, steps, row["x"], probe["accuracy"][name])
                found.setdefault(seed, []).append(point)
        return found

    def accuracies(self, data: str, run: str, label: str) -> dict[int, float]:
        """By seed, of those whose probes have the run. ``run``: its last checkpoint, or RUN/step-N, or
        ``RANDOM``."""
        probes = [
            (seed, entry.found)
            for seed in self.seeds
            for name, entry in self.record.items()
            if name.startswith(f"{data}/seed-{seed}/") and name.endswith("-probe.json")
        ]
        names = [(seed, probe["accuracy"], _entry(probe, run)) for seed, probe in probes]
        return {seed: accuracy[name][label] for seed, accuracy, name in names if name is not None}

    def neighbours(self) -> dict[int, dict[str, Any]]:
        """By seed, what `salt-eval rank` wrote of encoders of real videos."""
        return self._read("real/seed-{}/neighbours.json")

    def runs(self, data: str) -> dict[str, str]:
        """The runs of any seed, by name, and the objective of each."""
        folders = tuple(f"{data}/seed-{seed}/" for seed in self.seeds)
        return {
            name.rpartition("/")[2]: entry.found["objective"]
            for name, entry in sorted(self.record.items())
            if name.startswith(folders) and "objective" in entry.found
        }

    def flops(self, data: str, run: str) -> float | None:
        """Training compute of a run and of the teachers before it, by the paper's 6ND, of the first seed that
        has it."""
        for name in self._of_seeds(f"{data}/seed-{{}}/{run}").values():
            return sum(self.record[one].found["flops"] for one in with_teachers(self.record, name))
        return None

    def core_minutes(self, data: str, run: str) -> float | None:
        """What a run, the teachers before it and the caches between them took: the median of the seeds, since
        a command that was stopped counts with its last part alone."""
        of_seeds = []
        for name in self._of_seeds(f"{data}/seed-{{}}/{run}").values():
            runs = list(with_teachers(self.record, name))
            made = [*runs, *(targets for one in runs if (targets := self.record[one].found["targets"]))]
            of_seeds.append(sum(self.record[one].cpu_s for one in made) / 60)
        return statistics.median(of_seeds) if of_seeds else None

    def _of_seeds(self, pattern: str) -> dict[int, str]:
        """Names of jobs that have ended, by seed."""
        names = {seed: pattern.format(seed) for seed in self.seeds}
        return {seed: name for seed, name in names.items() if name in self.record}

    def _read(self, pattern: str) -> dict[int, dict[str, Any]]:
        return {seed: self.record[name].found for seed, name in self._of_seeds(pattern).items()}


def _entry(probe: dict[str, Any], run: str) -> str | None:
    """The name of a run's last checkpoint in a probe's table, if it is there."""
    names = probe["accuracy"]
    if run in names:
        return run
    return max(
        (name for name in names if name.startswith(f"{run}/step-")),
        key=lambda name: int(name.rpartition("-")[2]),
        default=None,
    )


def with_teachers(record: Record, run: str) -> Iterator[str]:
    """Names of a run, of the teacher whose latents it read, and so on."""
    yield run
    if targets := record[run].found["targets"]:
        yield from with_teachers(record, targets.removesuffix("-targets"))


def counterpart(run: str) -> str:
    """The run of the first claims that a run of another claim is held against."""
    return "teacher" if run.startswith("teacher") else "student"
