"""Which of some runs is the frozen teacher of which, and what the whole chain cost."""

from collections.abc import Mapping, Sequence

from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun


def teachers_among(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun | None]]:
    """By name of a run: for each frozen teacher that it learned from the run whose newest checkpoint that is;
    None where that is not among them.

    Compares fingerprints, so it loads the weights of every run, if any of them has a frozen teacher.
    """
    if not any(run.teacher_fingerprints for run in runs):
        return {run.name: [] for run in runs}
    by_fingerprint = {run.fingerprint: run for run in runs}
    return {run.name: [by_fingerprint.get(teacher) for teacher in run.teacher_fingerprints] for run in runs}


def training_flops(run: FinishedRun, teachers: Mapping[str, Sequence[FinishedRun | None]]) -> float | None:
    """The 6ND of a run and of every run it learned from, each once; None where a teacher's training is not
    known here, or what came before weights that a run began with."""
    chain: dict[str, FinishedRun] = {}
    todo: list[FinishedRun | None] = [run]
    while todo:
        one = todo.pop()
        if one is None or one.is_initialised:
            return None
        chain[one.name] = one
        todo += teachers[one.name]
    return sum(one.results.flops for one in reversed(chain.values()))
