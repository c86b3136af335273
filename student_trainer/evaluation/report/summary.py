"""``summary.json`` of a report: the numbers of the page for other programs."""

from collections.abc import Sequence
from typing import ClassVar

from salt_distill.common.config.base import Several
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun
from salt_distill.student_trainer.evaluation.probe.results import ProbeResults
from salt_distill.student_trainer.evaluation.records import Record
from salt_distill.student_trainer.evaluation.report.sharing import Sharing

SUMMARY_NAMES = {"digit": "appearance"}
"""What a label of the embedded data set is called here; every other label keeps its name."""


class TeacherSummary(Record):
    """The first teacher of the page."""

    loss_first: float
    loss_last: float


class StudentSummary(Record):
    """A student of a frozen teacher."""

    name: str
    source: Several[str]
    """Where each teacher's targets came from: service, cache or in-process."""
    loss_first: float
    loss_last: float
    teacher_wait_ms: float | None
    """Milliseconds of a step that waited for targets."""


class ServedClips(Record):
    """Counters of the teacher service."""

    clips_served: int
    clips_computed: int


class ReportSummary(Record):
    """None or empty where a part is missing."""

    writer: ClassVar[str] = "salt-eval report"

    teacher: TeacherSummary | None
    students: list[StudentSummary]
    server: ServedClips | None
    probe: dict[str, dict[str, float]]
    """Accuracies by encoder and label."""
    seconds: dict[str, float]
    """Of the steps of a script."""

    @classmethod
    def of(
        cls,
        runs: Sequence[FinishedRun],
        probe: ProbeResults | None,
        shared: Sharing | None,
        seconds: dict[str, float],
    ) -> "ReportSummary":
        """From what the page is made of."""
        teacher = next((run.results for run in runs if run.objective == "vpixel"), None)
        return cls(
            teacher=teacher and TeacherSummary(loss_first=teacher.loss_first, loss_last=teacher.loss_last),
            students=[_student(run) for run in runs if run.objective == "salt"],
            server=shared
            and ServedClips(clips_served=shared.clips_served, clips_computed=shared.clips_computed),
            probe={
                name: {SUMMARY_NAMES.get(label, label): value for label, value in row.items()}
                for name, row in (probe.accuracy if probe else {}).items()
            },
            seconds=seconds,
        )


def _student(run: FinishedRun) -> StudentSummary:
    return StudentSummary(
        name=run.name,
        source=run.results.source,
        loss_first=run.results.loss_first,
        loss_last=run.results.loss_last,
        teacher_wait_ms=run.results.teacher_wait_ms,
    )
