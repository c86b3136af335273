"""Which row of a probe is which run's: the one of the run's weights, whatever it is called."""

from collections.abc import Sequence
from dataclasses import dataclass

from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun
from salt_distill.student_trainer.evaluation.probe.results import ProbeResults


@dataclass(frozen=True)
class ProbedRuns:
    """A probe's results beside the runs of a page."""

    probe: ProbeResults
    runs: Sequence[FinishedRun]

    def row(self, run: FinishedRun) -> str | None:
        """The row of a run's newest weights; None where they were not probed."""
        return None if run.fingerprint is None else self.probe.named(run.fingerprint, run.name)

    def run(self, row: str) -> FinishedRun | None:
        """The run whose newest weights a row is of, the one of that name where several have them."""
        fingerprint = self.probe.encoders[row].fingerprint
        same = [run for run in self.runs if run.fingerprint == fingerprint]
        return next((run for run in same if run.name == row), same[0] if same else None)

    def accuracy(self, run: FinishedRun, label: str) -> str:
        """A run's accuracy, or a dash."""
        row = self.row(run)
        return "-" if row is None else f"{self.probe.accuracy[row][label]:.3f}"

    def not_measured(self) -> list[str]:
        """A sentence for each run that has no accuracy."""
        sentences = []
        for run in self.runs:
            if self.row(run) is not None:
                continue
            reason = "it was not probed"
            if run.fingerprint is None:
                reason = "its directory has no checkpoint, so its weights cannot be compared with the probe's"
            elif run.name in self.probe.encoders:
                other = self.probe.encoders[run.name].fingerprint
                reason = (
                    f"the probe's {run.name} has other weights ({other[:12]}; the run's newest checkpoint is"
                    f" {run.fingerprint[:12]})"
                )
            sentences.append(f"No accuracy of {run.name}: {reason}.")
        return sentences
