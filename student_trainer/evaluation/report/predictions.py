"""The report's section about what costs no probe and tells accuracy all the same."""

from collections.abc import Sequence

from salt_distill.student_trainer.evaluation.report import page
from salt_distill.student_trainer.evaluation.report.figures import accuracy_by_line
from salt_distill.student_trainer.evaluation.runs import Run
from salt_distill.student_trainer.evaluation.selection import NAMES, Selection


def section(found: Selection, runs: Sequence[Run]) -> str:
    """What costs no probe against what the probe found, and what it predicts for checkpoints that were not
    probed."""
    what, line = NAMES[found.by], found.line
    capital = what[0].upper() + what[1:]
    header = ["checkpoint", what, f"accuracy, {found.label}" if found.label else "accuracy", "predicted"]
    rows = []
    for point in found.in_order:
        predicted = "-" if line is None else "{:.3f}  [{:.3f}, {:.3f}]".format(*line.predict(point.x))
        rows.append(
            [
                point.name,
                f"{point.x:.4f}",
                "-" if point.accuracy is None else f"{point.accuracy:.3f}",
                predicted,
            ]
        )
    why = {
        "student-loss": (
            "A frozen teacher's targets do not move, so the losses of its students may be compared with each"
            " other."
        ),
        "teacher-loss": (
            "The number is the teacher's, the accuracy its students': the paper finds that the one does not"
            " tell the other."
        ),
        "rankme": (
            "The number is the teacher's, the accuracy its students': the paper finds that the one does not"
            " tell the other."
        ),
    }[found.by]
    parts = [
        page.text(
            f"{capital} on the {found.split} split, of every checkpoint that salt-eval select was given."
            f" {why}"
        ),
        page.table(header, rows),
    ]
    if line is None:
        return page.section(f"{capital} against accuracy", *parts, page.note(f"{found.verdict}."))
    colours = {run.name: colour for colour, run in enumerate(runs)}
    facts = [
        (f"{line.r2:.3f}", f"R\u00b2 of {line.num_points} probed checkpoints"),
        (
            f"{line.intercept:.3f} {'-' if line.slope < 0 else '+'} {abs(line.slope):.3g} x",
            f"accuracy at x, {what}",
        ),
    ]
    read = (
        "Filled: probed. Open: not probed, where the line says, with the interval in which 95% of new points"
        " would lie. Grey: the same all along the line."
    )
    chart = page.panel(accuracy_by_line(found, colours, chart_id="selection"))
    return page.section(
        f"{capital} against accuracy", parts[0], page.facts(facts), chart, page.note(read), parts[1]
    )
