"""A run's progress on the terminal, read from its metrics.jsonl: the same whether it trains here or in Ray's workers."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

POLL_S = 0.25
PLAIN_LINES = 10
"""Lines of a whole run where there is no terminal to draw a bar on."""


@contextmanager
def show_progress(run: Path, steps: int, console: rich.console.Console) -> Iterator[None]:
    """Shows the lines that are added to ``run``'s metrics inside the block."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, steps, console, stop), name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(run: Path, steps: int, console: rich.console.Console, stop: threading.Event) -> None:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(run.name, total=steps, status="starting")
        printed_step = 0
        for line in _new_lines(run / "metrics.jsonl", stop):
            progress.update(task, completed=line["step"], status=_status(line))
            due = line["step"] - printed_step >= steps / PLAIN_LINES or line["step"] == steps
            if not console.is_terminal and due:
                printed_step = line["step"]
                console.print(f"{run.name}: step {line['step']}/{steps}  {_status(line)}", highlight=False)


def _new_lines(path: Path, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Whole lines as they are written; ends after ``stop``, once the file has been read to its end."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        last_round = stop.is_set()
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        break
                    position += len(raw)
                    yield json.loads(raw)
        if last_round:
            return
        time.sleep(POLL_S)


def _status(line: dict[str, Any]) -> str:
    waits = f"waits: data {line['data_wait_ms']:.0f} ms, teacher {line['teacher_wait_ms']:.0f} ms"
    return f"loss {line['loss']:.4f}  {line['clips_per_s']:.0f} clips/s  {waits}"
