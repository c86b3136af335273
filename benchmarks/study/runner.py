"""Runs jobs, several at a time, and goes on where an earlier start ended."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.study.experiment import Job

ENDED = "ended.tsv"
"""Of the study's folder: a line for each job that ended well."""
_TERMINATION_S = 20.0
"""Longest that a job may take to end when it is told to, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a job took, the start that ended it; what a killed start took is not counted."""

    wall_s: float
    cpu_s: float
    """Of all its processes and threads."""


class JobError(RuntimeError):
    """A command of the study that failed."""


@dataclass(frozen=True, kw_only=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started_s: float


def read_ended(root: Path) -> dict[str, Ended]:
    """The jobs that have ended, by name."""
    path = root / ENDED
    lines = path.read_text().splitlines() if path.exists() else []
    fields = [line.split("\t") for line in lines]
    return {name: Ended(wall_s=float(wall_s), cpu_s=float(cpu_s)) for name, wall_s, cpu_s in fields}


def run(jobs: Sequence[Job], root: Path, *, at_once: int, minutes: float | None) -> bool:
    """Whether all jobs have ended; with ``minutes`` those that are left are stopped then, and go on at the
    next start.

    Raises JobError at the first that fails, after the others were stopped.
    """
    root.mkdir(parents=True, exist_ok=True)
    ended = set(read_ended(root))
    todo = [job for job in jobs if job.name not in ended]
    deadline_s = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    console = Console(stderr=True)
    columns = (
        TextColumn("study"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    running: list[_Running] = []
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("study", total=len(jobs), completed=len(jobs) - len(todo), now="")
            while (todo or running) and time.monotonic() < deadline_s:
                while len(running) < at_once and (
                    job := next((job for job in todo if ended.issuperset(job.needs)), None)
                ):
                    todo.remove(job)
                    running.append(_start(job, root))
                progress.update(task, now=", ".join(one.job.name for one in running))
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    time.sleep(0.1)
                    continue
                one = next(one for one in running if one.process.pid == pid)
                running.remove(one)
                one.process.returncode = os.waitstatus_to_exitcode(status)
                if one.process.returncode != 0:
                    raise JobError(_what_failed(one, root))
                wall_s = time.monotonic() - one.started_s
                with (root / ENDED).open("a") as file:
                    file.write(f"{one.job.name}\t{wall_s:.1f}\t{usage.ru_utime + usage.ru_stime:.1f}\n")
                ended.add(one.job.name)
                progress.advance(task)
                console.print(f"{len(ended)} of {len(jobs)}: {one.job.name}, {wall_s:.0f} s", highlight=False)
    finally:
        for one in running:
            _stop(one.process)
    return not todo and not running


def _start(job: Job, root: Path) -> _Running:
    made = root / job.name
    if not job.goes_on and made.is_dir():
        shutil.rmtree(made)
    made.parent.mkdir(parents=True, exist_ok=True)
    log = _log(job, root)
    log.parent.mkdir(parents=True, exist_ok=True)
    program, *arguments = map(str, job.command(root))
    path = sys.executable if program == "python" else str(Path(sys.executable).parent / program)
    with log.open("ab") as file:
        file.write(f"$ {program} {' '.join(arguments)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [path, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    return _Running(job=job, process=process, started_s=time.monotonic())


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a job and all that it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_TERMINATION_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(job: Job, root: Path) -> Path:
    return root / "logs" / f"{job.name}.txt"


def _what_failed(one: _Running, root: Path) -> str:
    log = _log(one.job, root)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return (
        f"{one.job.name} ended with exit status {one.process.returncode}; {log} has all that it said,"
        f" last:\n{tail}"
    )
