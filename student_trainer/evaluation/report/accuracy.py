"""The report's sections about accuracy: what the probes found, and what it cost to get there."""

from collections.abc import Mapping, Sequence

from salt_distill.student_trainer.evaluation.candidates import RANDOM_INIT
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun
from salt_distill.student_trainer.evaluation.report.blocks import Chart, DataTable, Paragraph, Section
from salt_distill.student_trainer.evaluation.report.figures import (
    AccuracyBar,
    CostPoint,
    accuracy_against_flops,
    accuracy_bars,
)
from salt_distill.student_trainer.evaluation.report.lineage import training_flops
from salt_distill.student_trainer.evaluation.report.probed_runs import ProbedRuns


def probe_bars(probed: ProbedRuns) -> Section:
    """The probe's accuracies as bars with their intervals and the chance level, and as numbers."""
    probe = probed.probe
    colours = {run.name: colour for colour, run in enumerate(probed.runs)}
    runs = {name: probed.run(name) for name in probe.accuracy}
    bars = {
        label: [
            AccuracyBar(
                name=name,
                colour=None if (run := runs[name]) is None else colours[run.name],
                value=row[label],
                interval=probe.interval[name][label],
            )
            for name, row in probe.accuracy.items()
        ]
        for label in probe.labels
    }
    clips = {name: encoder.clips for name, encoder in probe.encoders.items()}
    clips_differ = len(set(clips.values())) > 1
    rows = []
    for name, row in probe.accuracy.items():
        cells = [
            f"{row[label]:.3f}  [{'{:.3f}, {:.3f}'.format(*probe.interval[name][label])}]"
            for label in probe.labels
        ]
        rows.append([name, *cells, *([clips[name]] if clips_differ else [])])
    chance = {label: facts.chance for label, facts in probe.labels.items()}
    empty = [""] if clips_differ else []
    rows.append(["chance (largest class)", *(f"{value:.3f}" for value in chance.values()), *empty])
    facts = next(iter(probe.labels.values()))
    learned = f"learned on {facts.num_train:,} clips, scored on {facts.num_test:,} others"
    labels = [f"{label} ({facts.num_classes} classes)" for label, facts in probe.labels.items()]
    return Section(
        "Frozen-backbone probe",
        [
            Paragraph(f"An attentive probe on frozen features, {learned}: {probe.protocol}."),
            Chart(accuracy_bars(bars, chance, chart_id="probe")),
            Paragraph(
                "Thin lines: 95% Wilson interval over the test clips. Dashed: chance, which is always naming"
                " the training split's largest class.",
                quiet=True,
            ),
            DataTable(["encoder", *labels, *(["clips"] if clips_differ else [])], rows),
        ],
    )


def accuracy_and_compute(
    probed: ProbedRuns, teachers: Mapping[str, Sequence[FinishedRun | None]]
) -> Section | None:
    """Accuracy against what a run and its teachers cost to train; None where fewer than two runs have
    both."""
    probe = probed.probe
    flops = {run.name: training_flops(run, teachers) for run in probed.runs}
    by_label = {
        label: _random_weights(probed, label)
        + [
            CostPoint(
                name=run.name,
                colour=colour,
                flops=cost,
                value=probe.accuracy[row][label],
                interval=probe.interval[row][label],
            )
            for colour, run in enumerate(probed.runs)
            if (cost := flops[run.name]) is not None and (row := probed.row(run)) is not None
        ]
        for label in probe.labels
    }
    if sum(flops[run.name] is not None and probed.row(run) is not None for run in probed.runs) < 2:
        return None
    unknown = [run.name for run in probed.runs if flops[run.name] is None]
    without = (
        f" Without {', '.join(unknown)}: their teacher's training is not among these runs." if unknown else ""
    )
    explained = (
        "A student's compute is its own, with its teacher's forwards, and the whole training of the teacher"
        " it learned from: several students of one teacher pay that once, but here each counts it in full."
        " Random weights cost nothing. Runs of one cost and one accuracy lie on each other."
        " Dashed: the Pareto front, the best accuracy up to each cost."
    )
    return Section(
        "Accuracy against compute",
        [Paragraph(explained + without), Chart(accuracy_against_flops(by_label, chart_id="pareto"))],
    )


def _random_weights(probed: ProbedRuns, label: str) -> list[CostPoint]:
    """What an encoder scores that was not trained, where the probe has one: no front begins below it."""
    probe = probed.probe
    if RANDOM_INIT not in probe.accuracy:
        return []
    value, interval = probe.accuracy[RANDOM_INIT][label], probe.interval[RANDOM_INIT][label]
    return [CostPoint(name="random weights", colour=None, flops=0.0, value=value, interval=interval)]
