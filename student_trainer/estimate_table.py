"""What an estimate of a run says, as a record and as a table."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from salt_distill.student_trainer.run_flops import NAMES, scientific


@dataclass(frozen=True, kw_only=True)
class StudentEstimate:
    """Everything of a run's steps but targets from outside: times of one worker, the one with the most clips,
    FLOPs of all workers."""

    step_s: float
    optimizer_s: float
    """Of a step: the optimizer's part."""
    clips_per_s: float
    flops_per_s: float
    """Matrix products."""
    six_n_d: float
    """FLOPs of the whole run by the paper's rule."""
    exact: float
    """FLOPs of the whole run's matrix products."""
    timed_steps: int
    timed_clips_per_step: int


@dataclass(frozen=True, kw_only=True)
class TeacherEstimate:
    """The targets from outside, as in ``StudentEstimate``. A teacher that is served or cached takes no time
    here."""

    where: str
    """service, cache or in-process."""
    step_s: float = 0.0
    clips_per_s: float | None = None
    flops_per_s: float | None = None
    """This and ``exact`` are None where the teacher's architecture is not known here."""
    six_n_d: float
    exact: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Seconds, FLOPs and bytes of a whole run, as ``--estimate-out`` writes them."""

    objective: str
    """vpixel, salt or vjepa."""
    steps: int
    batch_size: int
    workers: int
    clips_per_worker: int
    """Of a step, on the worker that has the most."""
    device: str
    num_threads: int
    dtype: str
    """Of matrix products."""
    student: StudentEstimate
    teacher: TeacherEstimate | None
    step_s: float
    run_s: float
    worker_s: float
    """``run_s`` of all workers, added up."""
    six_n_d: float
    exact: float | None
    peak_memory_bytes: int
    """Of a worker."""


def print_estimate(estimate: RunEstimate) -> None:
    """As a table, with what it means below."""
    student, teacher = estimate.student, estimate.teacher
    rows = [(NAMES[estimate.objective], student)] + (
        [(f"teacher, {teacher.where}", teacher)] if teacher else []
    )
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "step", "clips/s", "whole run", "FLOPs, 6ND", "FLOPs, exact", "FLOP/s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, part in rows:
        here = part.step_s > 0
        table.add_row(
            name,
            duration(part.step_s) if here else "elsewhere",
            f"{part.clips_per_s:,.1f}" if here else "",
            duration(part.step_s * estimate.steps) if here else "",
            scientific(part.six_n_d),
            "" if part.exact is None else scientific(part.exact),
            "" if part.flops_per_s is None else scientific(part.flops_per_s),
        )
    if teacher is not None:
        exact = "" if estimate.exact is None else scientific(estimate.exact)
        rate = f"{estimate.clips_per_worker / estimate.step_s:,.1f}"
        table.add_row(
            "together",
            duration(estimate.step_s),
            rate,
            duration(estimate.run_s),
            scientific(estimate.six_n_d),
            exact,
        )
    console = Console()
    console.width = max(console.width, 110)  # a wide table is read by scrolling, not cut off
    console.print(table)
    for sentence in _explained(estimate):
        console.print(sentence, highlight=False, soft_wrap=True)


def _explained(estimate: RunEstimate) -> list[str]:
    student, num_clips = estimate.student, estimate.clips_per_worker
    sentences = [
        (
            f"{estimate.steps:,} steps of {estimate.batch_size:,} clips, {num_clips:,} of them on a worker:"
            f" {duration(estimate.run_s)}; {estimate.worker_s / 3600:,.2f} hours of all workers"
            f" ({estimate.workers}). Peak memory of a worker: {estimate.peak_memory_bytes / 1e9:.2f} GB."
        ),
        (
            f"Times and clips/s are one worker's, FLOPs the whole run's. Timed on {estimate.device},"
            f" {estimate.dtype}: {student.timed_steps} steps of {student.timed_clips_per_step} random"
            " clips, with the run's masks."
        ),
        "Not in it: reading, decoding, what workers exchange, and the held-out loss (--val-every).",
    ]
    if student.timed_clips_per_step != num_clips:
        sentences.append(
            "A worker's other mask groups are taken to cost what the timed ones do; the optimizer's step is"
            " counted once."
        )
    if estimate.teacher is not None and estimate.teacher.step_s > 0:
        sentences.append(
            "Student and teacher are added up: they share the device. Where a CPU has cores for both they"
            " overlap."
        )
    return sentences


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
