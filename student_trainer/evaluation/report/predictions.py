"""The report's section about what costs no probe and tells accuracy all the same."""

from collections.abc import Sequence

from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun
from salt_distill.student_trainer.evaluation.report.blocks import (
    Chart,
    DataTable,
    LargeNumbers,
    Paragraph,
    Section,
)
from salt_distill.student_trainer.evaluation.report.figures import accuracy_by_line
from salt_distill.student_trainer.evaluation.selection import NAMES, WHAT_IT_SAYS, SelectResults


def section(results: SelectResults, runs: Sequence[FinishedRun]) -> Section:
    """What costs no probe against what the probe found, and what it predicts for checkpoints that were not
    probed."""
    measure, line = NAMES[results.by], results.line
    capital = measure[0].upper() + measure[1:]
    title = f"{capital} against accuracy"
    lead = Paragraph(
        f"{capital} on the {results.split} split, of every checkpoint that salt-eval select was given."
        f" {WHAT_IT_SAYS[results.by]}"
    )
    table = _table(results)
    if line is None:
        return Section(title, [lead, table, Paragraph(f"{results.verdict}.", quiet=True)])
    colours = {run.name: colour for colour, run in enumerate(runs)}
    formula = f"{line.intercept:.3f} {'-' if line.slope < 0 else '+'} {abs(line.slope):.3g} x"
    facts = [
        (f"{line.r2:.3f}", f"R\u00b2 of {line.num_points} probed checkpoints"),
        (formula, f"accuracy at x, {measure}"),
    ]
    how_to_read = (
        "Filled: probed. Open: not probed, where the line says, with the interval in which 95% of new points"
        " would lie. Grey: the same all along the line."
    )
    return Section(
        title,
        [
            lead,
            LargeNumbers(facts),
            Chart(accuracy_by_line(results, colours, chart_id="selection")),
            Paragraph(how_to_read, quiet=True),
            table,
        ],
    )


def _table(results: SelectResults) -> DataTable:
    label = f"accuracy, {results.label}" if results.label else "accuracy"
    rows = []
    for row in results.in_order:
        guess = row.predicted
        rows.append(
            [
                row.name,
                f"{row.x:.4f}",
                row.not_measured or "-" if row.accuracy is None else f"{row.accuracy:.3f}",
                "-" if guess is None else f"{guess.accuracy:.3f}  [{guess.low:.3f}, {guess.high:.3f}]",
            ]
        )
    return DataTable(["checkpoint", NAMES[results.by], label, "predicted"], rows)
