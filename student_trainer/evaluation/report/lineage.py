"""Which of some runs is the frozen teacher of which, and what the whole chain cost."""

from collections.abc import Mapping, Sequence

from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun


def teachers_among(runs: Sequence[FinishedRun]) -> dict[str, FinishedRun | None]:
    """By name of a run: the run whose newest checkpoint it learned from; None where that is not among them,
    or it has no frozen teacher.

    Compares fingerprints, so it loads the weights of every run, if any of them has a frozen teacher.
    """
    if all(run.teacher_fingerprint is None for run in runs):
        return {run.name: None for run in runs}
    by_fingerprint = {run.fingerprint: run for run in runs}
    return {run.name: by_fingerprint.get(run.teacher_fingerprint or "") for run in runs}


def training_flops(run: FinishedRun, teachers: Mapping[str, FinishedRun | None]) -> float | None:
    """The 6ND of a run and of every run it learned from, one after the other; None where a teacher's training
    is not known here, or what came before weights that a run began with."""
    teacher = teachers[run.name]
    if run.is_initialised:
        return None
    if run.teacher_fingerprint is None:
        return run.results.flops
    of_teacher = None if teacher is None else training_flops(teacher, teachers)
    return None if of_teacher is None else of_teacher + run.results.flops
