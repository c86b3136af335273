"""The first paragraph of a report: what was found, in sentences, with how sure it is."""

import math
from collections.abc import Sequence

from salt_distill.student_trainer.evaluation.candidates import RANDOM_INIT
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun, UnfinishedRun
from salt_distill.student_trainer.evaluation.probe.results import ProbeResults
from salt_distill.student_trainer.evaluation.report.probed_runs import ProbedRuns


def findings(
    runs: Sequence[FinishedRun], unfinished: Sequence[UnfinishedRun], probed: ProbedRuns | None
) -> list[str]:
    """What was compared, then for each label the best encoder and its lead; without a probe the losses that
    may be compared."""
    sentences = [_compared(runs)] if runs else ["No run has finished: what stands here may still change."]
    sentences += _not_finished(unfinished)
    if probed is not None and probed.probe.accuracy:
        return [*sentences, *(_best_of_label(probed.probe, label) for label in probed.probe.labels)]
    sentences += _least_losses(runs)
    return [*sentences, "A loss does not say how good an encoder is, and none was probed (salt-eval probe)."]


def difference_interval(
    value: float, interval: tuple[float, float], other: float, other_interval: tuple[float, float]
) -> tuple[float, float]:
    """95% interval of ``value`` - ``other``, two shares with their Wilson intervals, by Newcombe's method 10
    (Statistics in Medicine 17, 1998, 873-890).

    It takes the two for independent. Two encoders are scored on the same clips, which makes the true interval
    narrower as a rule.
    """
    low = math.hypot(value - interval[0], other_interval[1] - other)
    high = math.hypot(interval[1] - value, other - other_interval[0])
    return value - other - low, value - other + high


def _compared(runs: Sequence[FinishedRun]) -> str:
    teachers = {teacher for run in runs for teacher in run.teacher_fingerprints}
    of = f"of {len(teachers)} frozen teacher{'s' * (len(teachers) > 1)}"
    kinds = {
        "vpixel": ("V-Pixel teacher", ""),
        "salt": ("student", f" {of}"),
        "vjepa": ("V-JEPA baseline", ""),
    }
    parts = []
    for objective, (kind, more) in kinds.items():
        if number := sum(run.objective == objective for run in runs):
            parts.append(f"{number} {kind}{'s' * (number > 1)}{more}")
    return f"Compared: {_listed(parts)}."


def _not_finished(runs: Sequence[UnfinishedRun]) -> list[str]:
    """Where each of them is."""
    where = [
        f"{run.name} (step {run.metrics[-1].step if run.metrics else 0:,} of {run.num_steps:,})"
        for run in runs
    ]
    return [f"Not finished: {_listed(where)}."] if where else []


def _best_of_label(probe: ProbeResults, label: str) -> str:
    """The best encoder of a label, and by how much it is better than one that learned nothing."""
    accuracy = {name: row[label] for name, row in probe.accuracy.items() if name != RANDOM_INIT}
    facts = probe.labels[label]
    where = f"{label} ({facts.num_classes} classes, {facts.num_test:,} {probe.reported_on} clips)"
    if not accuracy:
        return f"Of {where} only random weights were probed."
    best, value = max(accuracy.items(), key=lambda item: item[1])
    weights = {name: probe.encoders[name].fingerprint for name in accuracy}
    names = [name for name in accuracy if weights[name] == weights[best] or accuracy[name] == value]
    several = len(set(weights.values()))
    low, high = probe.interval[best][label]
    found = (
        f"On {where} {_listed(names)}{f', best of {several} encoders,' if several > 1 else ''}"
        f" name{'s' * (len(names) == 1)} {value:.1%} right [{low:.1%} to {high:.1%}]"
    )
    if RANDOM_INIT not in probe.accuracy:
        return (
            f"{found}; always naming the largest class gives {facts.chance:.1%}. Random weights were not"
            " probed, so what training gave is not known (salt-eval probe --random-init)."
        )
    random = probe.accuracy[RANDOM_INIT][label]
    low, high = difference_interval(value, (low, high), random, probe.interval[RANDOM_INIT][label])
    lead = f"{100 * (value - random):+.1f} points against random weights ({random:.1%})"
    if high < 0:
        verdict = " Random weights are better."
    elif low <= 0:
        verdict = " The interval holds 0, so no difference is shown."
    elif several > 1:
        verdict = " The best was picked on these clips, so its lead is on the high side."
    else:
        verdict = ""
    return f"{found}, {lead}, 95% interval {100 * low:+.1f} to {100 * high:+.1f}.{verdict}"


def _least_losses(runs: Sequence[FinishedRun]) -> list[str]:
    """For each teacher with several students, the one with the least last loss."""
    sentences = []
    # The loss of a run with several teachers is a mean by its weights, which no other run needs to have.
    of_one = [run for run in runs if len(run.teacher_fingerprints) == 1]
    for [teacher] in dict.fromkeys(run.teacher_fingerprints for run in of_one):
        students = [run for run in of_one if run.teacher_fingerprints == (teacher,)]
        if len(students) > 1:
            best = min(students, key=lambda run: run.results.loss_last)
            sentences.append(
                f"Of the {len(students)} students of teacher {teacher[:12]} {best.name} ends with the"
                f" least training loss, {best.results.loss_last:.3f}."
            )
    return sentences


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
