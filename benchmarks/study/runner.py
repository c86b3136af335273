"""Runs jobs, several at a time, and goes on where an earlier start ended, on this machine or another."""

import json
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
from benchmarks.study.record import Record

_WHOLE = "# ended well"
"""Last line of a job's log while what it made is whole, and here."""
_LENGTHS = "lengths.json"
"""Of the study's folder: of which lengths its data and checkpoints are."""
_TERMINATION_S = 20.0
"""Longest that a job may take to end when it is told to, in seconds."""


class JobError(RuntimeError):
    """A command of the study that failed."""


@dataclass(frozen=True, kw_only=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started_s: float


def run(jobs: Sequence[Job], root: Path, record: Record, *, at_once: int, minutes: float | None) -> bool:
    """Whether all jobs have ended; with ``minutes`` those that are left are stopped then, and go on at the
    next start. What they found is added to ``record``; jobs that it has are not run, but for those whose
    files another job reads and this machine does not have.

    Raises JobError at the first that fails, after the others were stopped, and where ``root`` has files of
    other lengths.
    """
    root.mkdir(parents=True, exist_ok=True)
    lengths = root / _LENGTHS
    if not lengths.exists():
        lengths.write_text(json.dumps(record.lengths))
    elif (got := json.loads(lengths.read_text())) != record.lengths:
        raise JobError(f"got {root} with files of {got}, expected {record.lengths}; give another --out")
    todo = _to_run(jobs, root, record)
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
                waiting = {job.name for job in (*todo, *(one.job for one in running))}
                while len(running) < at_once and (
                    job := next((job for job in todo if waiting.isdisjoint((*job.needs, *job.after))), None)
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
                said = _record(one.job, root, record, wall_s, usage.ru_utime + usage.ru_stime)
                progress.advance(task)
                left = len(todo) + len(running)
                console.print(
                    f"{len(jobs) - left} of {len(jobs)}: {one.job.name}, {wall_s:.0f} s{said}",
                    highlight=False,
                    soft_wrap=True,
                )
    finally:
        for one in running:
            _stop(one.process)
    return not todo and not running


def _to_run(jobs: Sequence[Job], root: Path, record: Record) -> list[Job]:
    """The jobs without an entry, and those before them whose files are not here, in their order."""
    names: set[str] = set()
    for job in reversed(jobs):
        if job.name not in record or job.name in names:
            names.add(job.name)
            names |= {name for name in job.needs if not _is_whole(name, root)}
    return [job for job in jobs if job.name in names]


def _is_whole(name: str, root: Path) -> bool:
    """Whether a job ended well here, and what it made is still there."""
    log = _log(name, root)
    return (root / name).exists() and log.exists() and log.read_text(errors="replace").endswith(f"{_WHOLE}\n")


def _record(job: Job, root: Path, record: Record, wall_s: float, cpu_s: float) -> str:
    """Adds what a job found; of one that the record has, says where it found something else now."""
    with _log(job.name, root).open("a") as file:
        file.write(f"{_WHOLE}\n")
    found = job.found(root / job.name)
    if job.name not in record:
        record.add(job.name, wall_s=wall_s, cpu_s=cpu_s, found=found)
        return ""
    before = record[job.name].found
    differs = [name for name in before if found.get(name) != before[name]]
    return ", for its files" + (f"; not as in {record.path}: {', '.join(differs)}" if differs else "")


def _start(job: Job, root: Path) -> _Running:
    made = root / job.name
    if made.exists() and (not job.goes_on or _is_whole(job.name, root)):
        # Whole, but without an entry: of another record, or its line was deleted. Continued, it would end at
        # once, and its time would be wrong.
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    made.parent.mkdir(parents=True, exist_ok=True)
    log = _log(job.name, root)
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


def _log(name: str, root: Path) -> Path:
    return root / "logs" / f"{name}.txt"


def _what_failed(one: _Running, root: Path) -> str:
    log = _log(one.job.name, root)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return (
        f"{one.job.name} ended with exit status {one.process.returncode}; {log} has all that it said,"
        f" last:\n{tail}"
    )
