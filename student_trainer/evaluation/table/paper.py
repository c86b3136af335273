"""The paper's Tables 9, 12, 13, 14 and 16 with the numbers of our runs (arXiv:2509.24317)."""

from collections.abc import Sequence

from salt_distill.student_trainer.evaluation.table.measured import Measured, MeasuredRun
from salt_distill.student_trainer.evaluation.table.rows import (
    BENCHMARKS,
    METHODS,
    PHYSICS,
    ResultTable,
    RowGroup,
    in_steps,
    percents,
    row_group,
    teacher_size,
)

_FOUR = ("k400", "ssv2", "in1k", "coin")
_SIX = ("in1k", "k400", "ssv2", "coin", "diving48", "jester")
_DATA = ("V-3.6M", "K710", "Panda2.8M", "SSv2", "K710 + SSv2", "ImageNet-1k")
_BASELINE = ("V-JEPA 2 (baseline)", "-")
_BUDGETS = {
    240_000: [("80k+80k", "80k"), ("40k+80k", "120k"), ("80k", "160k"), ("40k", "200k"), ("20k", "220k")],
    160_000: [("80k", "80k"), ("40k", "120k"), ("20k", "140k")],
    120_000: [("80k", "40k"), ("40k", "80k"), ("20k", "100k")],
}
"""Total steps: those of the teachers, and of the student."""


def paper_tables(measured: Measured) -> list[ResultTable]:
    """Each with all rows that the paper has, empty where nothing was run; runs that it has not come after
    these."""
    runs = measured.runs
    stage_1 = [run for run in runs if run.run.objective == "vpixel"]
    students = [run for run in runs if run.run.objective == "salt"]
    baselines = [run for run in runs if run.run.objective == "vjepa"]
    return [
        _physics(measured, stage_1, students, baselines),
        _methods(stage_1, students, baselines),
        _data(stage_1, students),
        _sizes(stage_1, students),
        _budgets(students, baselines),
    ]


def _columns(*words: str, names: Sequence[str]) -> tuple[str, ...]:
    return (*words, *(BENCHMARKS[name] for name in names), "Avg", "run")


def _physics(
    measured: Measured,
    stage_1: Sequence[MeasuredRun],
    students: Sequence[MeasuredRun],
    baselines: Sequence[MeasuredRun],
) -> ResultTable:
    others = [
        (other.name, "", *percents(other.scores, PHYSICS), "")
        for other in measured.others
        if set(other.scores) & set(PHYSICS)
    ]
    groups = [
        ("V-JEPA 2", ("ViT-B", "ViT-L", "ViT-H"), baselines),
        (METHODS["vpixel"], (), stage_1),
        ("SALT", ("ViT-B", "ViT-L", "ViT-H"), students),
    ]
    blocks = [
        row_group(
            heading,
            [(size,) for size in sizes],
            runs,
            key=lambda run: (run.size,),
            names=PHYSICS,
            facts=lambda run: (f"{run.run.results.num_parameters.predictor / 1e6:.3g}M",),
            num_facts=1,
        )
        for heading, sizes, runs in groups
    ]
    return ResultTable(
        title="Table 9: intuitive physics, pairs judged right in percent (average surprise, of each property"
        " the best context)",
        columns=_columns("Encoder", "Predictor", names=PHYSICS),
        blocks=[RowGroup(heading="Other models (the paper: VideoMAE V2, ViT-g)", rows=others), *blocks],
        num_texts=1,
    )


def _methods(
    stage_1: Sequence[MeasuredRun], students: Sequence[MeasuredRun], baselines: Sequence[MeasuredRun]
) -> ResultTable:
    groups = [
        (METHODS["vjepa"], [(size, size) for size in ("ViT-B", "ViT-L", "ViT-H")], baselines),
        (METHODS["vpixel"], [("N/A", size) for size in ("ViT-B", "ViT-L")], stage_1),
        (
            METHODS["salt"],
            [("ViT-B", "ViT-B"), *(("ViT-L", size) for size in ("ViT-L", "ViT-H", "ViT-g", "ViT-G"))],
            students,
        ),
    ]
    return ResultTable(
        title="Table 12: V-JEPA 2 and SALT on the same data, Top-1 in percent",
        columns=_columns("Teacher", "Student", names=_SIX),
        blocks=[
            row_group(heading, expected, runs, key=lambda run: (teacher_size(run), run.size), names=_SIX)
            for heading, expected, runs in groups
        ],
        num_texts=2,
    )


def _data(stage_1: Sequence[MeasuredRun], students: Sequence[MeasuredRun]) -> ResultTable:
    groups = [("SALT-teacher", stage_1), ("SALT-student", [run for run in students if run.is_whole])]
    return ResultTable(
        title="Table 13: what stage 1 learned from, Top-1 in percent",
        columns=_columns("Dataset", "# Samples", names=_FOUR),
        blocks=[
            row_group(
                heading,
                [(name,) for name in _DATA],
                runs,
                key=lambda run: (_as_in_the_paper(run.chain[0].data.name),),
                names=_FOUR,
                facts=_num_samples,
                num_facts=1,
            )
            for heading, runs in groups
        ],
        num_texts=1,
    )


def _sizes(stage_1: Sequence[MeasuredRun], students: Sequence[MeasuredRun]) -> ResultTable:
    teachers = row_group(
        "Teachers",
        [(size, "-") for size in ("ViT-B", "ViT-L", "ViT-H", "ViT-G")],
        stage_1,
        key=lambda run: (run.size, "-"),
        names=_FOUR,
    )
    of_students = row_group(
        "SALT-student",
        [
            *((size, "ViT-L") for size in ("ViT-B", "ViT-L", "ViT-H", "ViT-G")),
            *((size, "ViT-G") for size in ("ViT-B", "ViT-L", "ViT-H")),
        ],
        students,
        key=lambda run: (teacher_size(run), run.size),
        names=_FOUR,
    )
    return ResultTable(
        title="Table 14: size of the teacher, Top-1 in percent",
        columns=_columns("Teacher", "Student", names=_FOUR),
        blocks=[teachers, of_students],
        num_texts=2,
    )


def _budgets(students: Sequence[MeasuredRun], baselines: Sequence[MeasuredRun]) -> ResultTable:
    """Of chains in which every encoder is of one size."""
    runs = [
        run
        for run in (*baselines, *students)
        if run.is_whole and {step.size for step in run.chain} == {run.size}
    ]
    expected = {(total, "ViT-L"): rows for total, rows in _BUDGETS.items()}
    budgets = dict.fromkeys((*expected, *((sum(run.steps), run.size) for run in runs)))
    return ResultTable(
        title="Table 16: compute at matched total steps, 6ND in 10^21 FLOPs, Top-1 in percent",
        columns=_columns(
            *("Teacher steps", "Student steps", "Teacher FLOPs", "Student FLOPs", "Total FLOPs"), names=_FOUR
        ),
        blocks=[
            row_group(
                f"Budget: {in_steps(total)} total steps, {size}",
                [_BASELINE, *expected.get((total, size), [])],
                [run for run in runs if (sum(run.steps), run.size) == (total, size)],
                key=_steps_of_chain,
                names=_FOUR,
                facts=_flops_of_chain,
                num_facts=3,
            )
            for total, size in budgets
        ],
        num_texts=2,
    )


def _steps_of_chain(run: MeasuredRun) -> tuple[str, ...]:
    if not run.teachers:
        return _BASELINE
    return ("+".join(map(in_steps, run.steps[:-1])), in_steps(run.run.results.steps))


def _flops_of_chain(run: MeasuredRun) -> tuple[str, str, str]:
    """Before the run, of the run, and of both; the paper has the baseline's in the first."""
    if not run.teachers:
        return (_flops(run.flops), "-", _flops(run.flops))
    own = run.run.results.flops
    return (_flops(None if run.flops is None else run.flops - own), _flops(own), _flops(run.flops))


def _flops(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e21:.3f}" if value >= 1e18 else f"{value / 1e21:.3g}"


def _num_samples(run: MeasuredRun) -> tuple[str]:
    count = run.chain[0].data.num_samples
    return ("" if count is None else f"{count:,}",)


def _as_in_the_paper(name: str) -> str:
    return next((known for known in _DATA if known.casefold() == name.casefold()), name)
