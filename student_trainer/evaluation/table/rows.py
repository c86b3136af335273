"""Tables of runs as they are printed, and their cells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from salt_distill.student_trainer.evaluation.table.measured import Measured, MeasuredRun

BENCHMARKS = {
    "k400": "K400",
    "ssv2": "SSv2",
    "in1k": "IN1k",
    "coin": "COIN",
    "diving48": "Diving-48",
    "jester": "Jester",
    "intphys": "IntPhys",
    "grasp": "GRASP",
    "inflevel": "InfLevel",
}
"""The paper's, by the names that the command takes."""
PHYSICS = ("intphys", "grasp", "inflevel")
METHODS = {"vjepa": "V-JEPA 2", "vpixel": "SALT Stage 1 (V-Pixel)", "salt": "SALT Stage 2"}


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Rows under a heading, or under none."""

    heading: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """A table as it is printed."""

    title: str
    columns: Sequence[str]
    blocks: Sequence[RowGroup]
    num_texts: int
    """Columns from the left that are words, not numbers."""


def table_of_runs(measured: Measured) -> ResultTable:
    """A row a run."""
    names = list(dict.fromkeys(name for run in measured.runs for name in run.scores))
    physics = [name for name in names if name in PHYSICS]
    probed = [name for name in names if name not in PHYSICS]
    rows = [
        (
            run.run.name,
            METHODS[run.run.objective],
            run.size,
            teacher_size(run),
            run.data.name,
            "+".join(map(in_steps, run.steps)) if run.is_whole else f"?+{in_steps(run.run.results.steps)}",
            "" if run.flops is None else f"{run.flops:.3g}",
            *percents(run.scores, probed),
            *percents(run.scores, physics)[:-1],
        )
        for run in measured.runs
    ]
    columns = ("run", "method", "encoder", "teacher", "data", "steps", "6ND FLOPs")
    return ResultTable(
        title="Runs, accuracies in percent",
        columns=(
            *(*columns, *(BENCHMARKS.get(name, name) for name in probed), "Avg"),
            *(BENCHMARKS[name] for name in physics),
        ),
        blocks=[RowGroup(heading="", rows=rows)],
        num_texts=6,
    )


def row_group(
    heading: str,
    expected: Sequence[tuple[str, ...]],
    runs: Sequence[MeasuredRun],
    *,
    key: Callable[[MeasuredRun], tuple[str, ...]],
    names: Sequence[str],
    facts: Callable[[MeasuredRun], Sequence[str]] = lambda _: (),
    num_facts: int = 0,
) -> RowGroup:
    """A row for each key that is ``expected``, empty where no run has it, then those of other runs: key,
    ``facts`` (``num_facts`` cells), percents of the benchmarks in ``names``, their mean, the run's name."""
    by_key: dict[tuple[str, ...], list[MeasuredRun]] = {row: [] for row in expected}
    for run in runs:
        by_key.setdefault(key(run), []).append(run)
    rows: list[tuple[str, ...]] = []
    for row, of_row in by_key.items():
        rows += [(*row, *facts(run), *percents(run.scores, names), run.run.name) for run in of_row]
        if not of_row:
            rows.append((*row, *[""] * num_facts, *percents({}, names), ""))
    return RowGroup(heading=heading, rows=rows)


def percents(scores: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Of each benchmark, empty where it was not measured, and their mean where every one was."""
    cells = ["" if name not in scores else f"{100 * scores[name]:.1f}" for name in names]
    mean = f"{100 * sum(scores[name] for name in names) / len(names):.1f}" if names and all(cells) else ""
    return [*cells, mean]


def teacher_size(run: MeasuredRun) -> str:
    """N/A of a stage 1, its own of a baseline; a question mark where the teacher is not among the runs."""
    if run.run.objective == "vjepa":
        return run.size
    if run.run.objective == "vpixel":
        return "N/A"
    return " + ".join("?" if teacher is None else teacher.size for teacher in run.teachers)


def in_steps(count: int) -> str:
    """80k for 80,000."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
