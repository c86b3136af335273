"""The report's table of runs, and their loss curves."""

from collections.abc import Sequence
from itertools import chain

from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun, UnfinishedRun
from salt_distill.student_trainer.evaluation.report.blocks import Block, Chart, Heading, Paragraph, Section
from salt_distill.student_trainer.evaluation.report.figures import LossCurve, loss_curves
from salt_distill.student_trainer.evaluation.report.probed_runs import ProbedRuns
from salt_distill.student_trainer.evaluation.report.render import duration, quantity

TARGETS = {
    "vpixel": "pixels",
    "service": "served",
    "cache": "cached",
    "in-process": "in-process",
    "vjepa": "moving average",
}
"""What a run learned to predict, by where it came from, or by its objective."""
_EXPLAINED = {
    "vpixel": ("Mean squared error of the hidden cubes' normalised pixels.", "MSE"),
    "salt": (
        (
            "L1 to the frozen teacher's latents. The target does not move, so these losses may be compared"
            " with each other."
        ),
        "L1",
    ),
    "vjepa": (
        "L1 to the moving average's latents: the target moves, so this loss says little by itself.",
        "L1",
    ),
}
"""What the loss of an objective is, and its name on an axis."""


def headline(
    runs: Sequence[FinishedRun], unfinished: Sequence[UnfinishedRun], probed: ProbedRuns | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of runs, plain text: for the page, and in part for the terminal."""
    labels = list(probed.probe.labels) if probed else []
    header = ["run", "targets", "weights", "steps", "time", "compute", "loss", "step", "wait", *labels]
    rows = []
    for run in runs:
        results = run.results
        wait = results.teacher_wait_ms
        rows.append(
            [
                run.name,
                " + ".join(TARGETS[kind] for kind in results.source or (run.objective,)),
                quantity(results.num_parameters.encoder, "").strip(),
                f"{results.steps:,}",
                duration(results.steps * results.step_ms / 1000),
                quantity(results.flops, "FLOPs"),
                f"{results.loss_first:.3f} \u2192 {results.loss_last:.3f}",
                f"{results.step_ms:.0f} ms",
                "-" if wait is None else f"{wait:.1f} ms",
                *(probed.accuracy(run, label) for label in labels if probed),
            ]
        )
    for run in unfinished:
        losses = [line.loss for line in run.metrics]
        rows.append(
            [
                f"{run.name} (unfinished)",
                " + ".join(TARGETS[kind] for kind in run.source or (run.objective,)),
                "-",
                f"{run.metrics[-1].step if losses else 0:,} of {run.num_steps:,}",
                "-",
                quantity(run.metrics[-1].flops, "FLOPs") if losses else "-",
                f"{losses[0]:.3f} \u2192 {losses[-1]:.3f}" if losses else "-",
                "-",
                "-",
                *("-" for _ in labels),
            ]
        )
    for name, row in probed.probe.accuracy.items() if probed else ():
        if probed and probed.run(name) is None:  # random-init has an accuracy, but is no run
            dashes = ["-"] * (len(header) - 1 - len(labels))
            rows.append([name, *dashes, *(f"{row[label]:.3f}" for label in labels)])
    return header, rows


def curves(runs: Sequence[FinishedRun], unfinished: Sequence[UnfinishedRun]) -> Section:
    """Loss curves: runs whose losses may be compared stand in one chart."""
    charts: dict[tuple[str, str], list[LossCurve]] = {}
    for colour, run in enumerate(chain(runs, unfinished)):
        if not run.metrics:
            continue
        # A moving target makes every V-JEPA run a chart of its own; V-Pixel losses have one target, the
        # pixels.
        of_teachers = " + ".join(teacher[:12] for teacher in run.teacher_fingerprints)
        if len(run.teacher_fingerprints) > 1:  # a mean that depends on the weights too
            of_teachers += f", {run.name}"
        group = {"vpixel": "", "salt": of_teachers, "vjepa": run.name}[run.objective]
        charts.setdefault((run.objective, group), []).append(
            LossCurve(
                name=run.name if isinstance(run, FinishedRun) else f"{run.name} (unfinished)",
                colour=colour,
                steps=[line.step for line in run.metrics],
                flops=[line.flops for line in run.metrics],
                losses=[line.loss for line in run.metrics],
            )
        )
    blocks: list[Block] = []
    for number, ((objective, group), members) in enumerate(charts.items()):
        stage = {
            "vpixel": "Stage 1",
            "salt": f"Stage 2, teacher {group or 'not known yet'}",
            "vjepa": "EMA baseline",
        }[objective]
        explained, loss_name = _EXPLAINED[objective]
        drawn = loss_curves(members, chart_id=f"loss{number}", loss_name=loss_name)
        blocks += [
            Heading(f"{stage}: {', '.join(curve.name for curve in members)}"),
            Paragraph(" ".join([explained, *drawn.notes]), quiet=True),
            Chart(drawn.svg),
        ]
    return Section("Losses", blocks or [Paragraph("No run has logged a step yet.", quiet=True)])
