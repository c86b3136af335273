"""What the runs of the study say: accuracies by seed, differences with their intervals, costs."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

LABELS = {"digits": "motion", "strokes": "character"}
"""The label that claims are about."""
RANDOM = "random-init"


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


def difference(better: Sequence[float], worse: Sequence[float]) -> Difference:
    """Of two runs' accuracies, in the order of their seeds."""
    by_seed = tuple(one - other for one, other in zip(better, worse, strict=True))
    mean = statistics.fmean(by_seed)
    if len(by_seed) < 2:
        return Difference(by_seed, mean, None)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(by_seed) - 1)) * statistics.stdev(by_seed) / math.sqrt(len(by_seed))
    return Difference(by_seed, mean, (mean - half, mean + half))


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The probes that are there, of all seeds that have them."""

    root: Path
    num_seeds: int

    def probes(self, data: str, experiment: str = "base") -> dict[int, dict[str, Any]]:
        """By seed, what `salt-eval probe` wrote."""
        return self._read(f"{data}/seed-{{}}/{experiment}-probe.json")

    def selections(self) -> dict[int, dict[str, Any]]:
        """By seed, what `salt-eval select` wrote."""
        return self._read("digits/seed-{}/select.json")

    def accuracies(self, data: str, run: str, label: str, experiment: str = "base") -> dict[int, float]:
        """By seed. ``run``: its last checkpoint, or RUN/step-N, or ``RANDOM``."""
        return {
            seed: probe["accuracy"][_entry(probe, run)][label]
            for seed, probe in self.probes(data, experiment).items()
        }

    def flops(self, data: str, *runs: str) -> float | None:
        """Training compute of these runs together by the paper's 6ND, of the first seed that has them."""
        for seed in range(self.num_seeds):
            paths = [self.root / data / f"seed-{seed}" / run / "summary.json" for run in runs]
            if all(path.exists() for path in paths):
                return sum(json.loads(path.read_text())["flops"] for path in paths)
        return None

    def _read(self, pattern: str) -> dict[int, dict[str, Any]]:
        paths = {seed: self.root / pattern.format(seed) for seed in range(self.num_seeds)}
        return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


def _entry(probe: dict[str, Any], run: str) -> str:
    """The name of a run's last checkpoint in a probe's table."""
    names = probe["accuracy"]
    if run in names:
        return run
    return max(
        (name for name in names if name.startswith(f"{run}/step-")),
        key=lambda name: int(name.rpartition("-")[2]),
    )
