"""`salt-train sweep`: several students of one teacher, each a `salt-train student` of its own, their workers
placed by one Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import rich.console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from salt_distill.common.config import StudentRun, SweepConfig, dump_yaml, load_yaml
from salt_distill.common.console import console
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.devices import gpus_of_worker
from salt_distill.common.local_ray import is_private, join, leave, ray_to_join
from salt_distill.common.untouched import left_as_it_was
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.job import ENVIRONMENT
from salt_distill.student_trainer.resume import continued
from salt_distill.student_trainer.run_directory import check_run
from salt_distill.student_trainer.sweep.sweep_file import runs_of
from salt_distill.student_trainer.sweep.table import SharedWork, print_table, summarise

POLL_S = 0.5
PLAIN_LINES = 10
"""Lines of a whole run where there is no terminal to draw on."""
_STUDENT = [
    sys.executable,
    "-P",
    "-c",
    "import sys; sys.argv[0] = 'salt-train'; from salt_distill.programs import train; train()",
    "student",
]
_TAIL_BYTES = 8192


def run(config: SweepConfig, console: rich.console.Console = console) -> None:
    """Trains what is not done yet, then prints the table and writes ``summary.json``. Raises ValueError where
    a run failed."""
    runs, out = runs_of(config), Path(config.out)
    to_do = {name: student for name, student in runs.items() if not has_ended(student)}
    console.print(f"{len(runs)} runs, {len(runs) - len(to_do)} of them done", highlight=False)
    failed: dict[str, str] = {}
    with (
        left_as_it_was(out, unless=lambda: any((out / "logs").glob("*.log"))),
        SharedWork(next(iter(runs.values())), out / "summary.json") as shared,
    ):
        for folder in (out / "configs", out / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        if is_private(config.address):
            for data, split in {(student.data, student.split) for student in to_do.values()}:
                open_dataset(data).samples(split)  # before a Ray starts, which takes seconds
        if to_do:
            failed = _train(to_do, config, console)
        summary = summarise(runs, failed, shared)
    text = json.dumps(summary.model_dump(), indent=2)
    write_whole(out / "summary.json", text + "\n")
    if config.json_:
        print(text)
    else:
        print_table(summary)
    if failed:
        said = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed; the same command continues them. {said}")


def has_ended(config: StudentRun) -> bool:
    """Whether a run has come to its last step, or had no gain for as long as it may. Raises ValueError where
    it has begun, and learned something else than the file says now."""
    summary = Path(config.out) / "summary.json"
    if summary.exists():
        before = continued(load_yaml(Path(config.out) / "config.yaml"), config, Path(config.out))
        results = json.loads(summary.read_text())
        had_no_gain = results.get("ended_early", False)
        if results["steps"] >= config.steps or (
            had_no_gain and before.stop_after_no_gain == config.stop_after_no_gain
        ):
            return True
    check_run(config)
    return False


def _train(
    to_do: Mapping[str, StudentRun], config: SweepConfig, console: rich.console.Console
) -> dict[str, str]:
    """Why runs failed, by name. A run starts when there is room for its workers beside those of the
    others."""
    with ray_to_join(config.address, environment=ENVIRONMENT) as ray_arguments:
        import ray

        join(ray_arguments)
        room = ray.available_resources()
        address = ray.get_runtime_context().gcs_address
        leave()
        waiting, failed = dict(to_do), dict[str, str]()
        with _ended() as running, _shown(to_do, console) as display:
            while waiting or running:
                for name, student in list(waiting.items()):
                    if not running or fits(student, [to_do[other] for other in running], room):
                        running[name] = _start(name, waiting.pop(name), Path(config.out), address)
                        taken = _said(needs(student, room))
                        display.say(name, f"started with {taken}; log: {_log(config, name)}")
                for name, process in list(running.items()):
                    display.look(name, to_do[name])
                    if process.poll() is None:
                        continue
                    del running[name]
                    if process.returncode != 0:
                        failed[name] = (
                            _last_line(_log(config, name)) or f"it ended with code {process.returncode}"
                        )
                    display.say(name, f"failed, {failed[name]}" if name in failed else "done")
                time.sleep(POLL_S)
    return failed


def needs(config: StudentRun, room: Mapping[str, float]) -> dict[str, float]:
    """What a Ray with ``room`` sets aside for a run, at least."""
    return {
        "CPU": config.fewest_workers * config.cpus_per_worker,
        "GPU": config.fewest_workers * gpus_of_worker(config, room),
    }


def fits(config: StudentRun, beside: list[StudentRun], room: Mapping[str, float]) -> bool:
    """Whether there is room for a run beside others."""
    taken = [needs(other, room) for other in (config, *beside)]
    return all(sum(of_run[name] for of_run in taken) <= room.get(name, 0.0) for name in ("CPU", "GPU"))


def _said(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)


def _start(name: str, config: StudentRun, out: Path, address: str) -> subprocess.Popen[bytes]:
    """The run as a process that joins the sweep's Ray."""
    file = out / "configs" / f"{name}.yaml"
    file.write_text(dump_yaml(config))
    with (out / "logs" / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*_STUDENT, "--config", str(file)],
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_ADDRESS": address},
        )


def _log(config: SweepConfig, name: str) -> Path:
    return Path(config.out) / "logs" / f"{name}.log"


def _last_line(path: Path) -> str:
    """The newest whole line of a file, "" where there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = [line for line in file.read().decode(errors="replace").split("\n")[:-1] if line.strip()]
    return lines[-1] if lines else ""


@contextmanager
def _ended() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes by name; those that still run when the block is left by Ctrl-C, SIGTERM or an error are
    ended, and waited for."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


class _Display:
    """A bar for each run; plain lines where there is no terminal."""

    def __init__(self, runs: Mapping[str, StudentRun], console: rich.console.Console) -> None:
        self._console = console
        self.bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {
            name: self.bars.add_task(name, total=config.steps, said="waits for room")
            for name, config in runs.items()
        }
        self._printed = dict.fromkeys(runs, 0)

    def say(self, name: str, sentence: str) -> None:
        """What happened to a run."""
        self._console.print(f"{name}: {sentence}", highlight=False, soft_wrap=True, markup=False)
        self.bars.update(self._tasks[name], said=sentence.partition(" ")[0].rstrip(",;"))

    def look(self, name: str, config: StudentRun) -> None:
        """Shows where a run is, from its metrics."""
        text = _last_line(Path(config.out) / "metrics.jsonl")
        if not text:
            return
        line = json.loads(text)
        self.bars.update(
            self._tasks[name],
            completed=line["step"],
            said=f"loss {line['loss']:.4f}  {line['clips_per_s']:.0f} clips/s",
        )
        if not self._console.is_terminal and line["step"] - self._printed[name] >= config.steps / PLAIN_LINES:
            self._printed[name] = line["step"]
            self._console.print(
                f"{name}: step {line['step']}/{config.steps}  loss {line['loss']:.4f}",
                highlight=False,
                soft_wrap=True,
            )


@contextmanager
def _shown(runs: Mapping[str, StudentRun], console: rich.console.Console) -> Iterator[_Display]:
    display = _Display(runs, console)
    with Live(display.bars, console=console, refresh_per_second=2) if console.is_terminal else nullcontext():
        yield display
