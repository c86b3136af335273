"""A run's progress on the terminal, read from its metrics.jsonl: the same whether it trains here or in Ray's
workers."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import rich.console
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from salt_distill.common.metrics_line import MetricsLine

POLL_S = 0.25
PLAIN_LINES = 10
"""Lines of a whole run where there is no terminal to draw on."""
CURVE_LINES = 24
"""Newest losses that are drawn."""
BARS = "▁▂▃▄▅▆▇█"


@contextmanager
def show_progress(
    run: Path,
    steps: int,
    console: rich.console.Console,
    advice: Callable[[MetricsLine], str | None] = lambda _: None,
) -> Iterator[None]:
    """Shows the lines that are added to ``run``'s metrics inside the block, and what ``advice`` says of each,
    if anything."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, steps, console, advice, stop), name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(
    run: Path,
    steps: int,
    console: rich.console.Console,
    advice: Callable[[MetricsLine], str | None],
    stop: threading.Event,
) -> None:
    display = Display(run.name, steps)
    with Live(display, console=console, refresh_per_second=4) if console.is_terminal else nullcontext():
        printed_step = 0
        for line in _new_lines(run / "metrics.jsonl", stop):
            display.show(line)
            if (sentence := advice(line)) is not None:
                console.print(f"{run.name}: {sentence}", highlight=False, markup=False, soft_wrap=True)
            due = line.step - printed_step >= steps / PLAIN_LINES or line.step == steps
            if not console.is_terminal and due:
                printed_step = line.step
                console.print(
                    f"{run.name}: step {line.step}/{steps}  {plain(line, steps)}{display.held_out}",
                    highlight=False,
                    soft_wrap=True,
                )


class Display:
    """What a terminal shows of a run; redrawn in place."""

    def __init__(self, name: str, steps: int) -> None:
        self._steps = steps
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._task = self._bar.add_task(name, total=steps)
        self._line: MetricsLine | None = None
        self._losses: list[float] = []
        self._val_losses: list[tuple[float, int]] = []
        """On held-out clips, each with its step."""
        self._predicted = ""

    def show(self, line: MetricsLine) -> None:
        """From now on this line of metrics."""
        self._line = line
        self._losses = [*self._losses, line.loss][-CURVE_LINES:]
        if line.val_loss is not None:
            self._val_losses.append((line.val_loss, line.step))
            self._predicted = predicted(line)
        self._bar.update(self._task, completed=line.step)

    @property
    def held_out(self) -> str:
        """The newest loss on held-out clips, and the least since the command began; nothing before one."""
        if not self._val_losses:
            return ""
        (newest, _), (least, step) = self._val_losses[-1], min(self._val_losses)
        return f"  held-out loss {newest:.4f}, best {least:.4f} at step {step}{self._predicted}"

    def __rich__(self) -> Group:
        """The bar, and below it the newest line in a few rows."""
        line = self._line
        if line is None:
            return Group(self._bar, Text("starting", style="dim"))
        rows = [
            [
                ("loss", f"{line.loss:.4f}{losses_of_teachers(line)} {curve(self._losses)}"),
                ("lr", f"{line.lr:.2e}"),
                ("gradient norm", f"{line.grad_norm:.3g}"),
            ],
            [
                ("clips/s", f"{line.clips_per_s:,.1f}"),
                ("tokens/s", f"{line.tokens_per_s:,.0f}"),
                ("MFU", f"{line.mfu:.1%}"),
                ("step", f"{line.step_ms:,.0f} ms"),
                ("ETA", _eta(line, self._steps)),
            ],
            [
                ("waits: teacher", f"{line.teacher_wait_ms:,.0f} ms"),
                ("data", f"{line.data_wait_ms:,.0f} ms"),
                ("tokens: context", f"{line.context_fraction:.1%}"),
                ("target", f"{line.target_fraction:.1%}"),
                *([("bad clips", str(line.bad_clips))] if line.bad_clips else []),
            ],
        ]
        texts = [Text("  ").join(_named(name, value) for name, value in row) for row in rows]
        if self.held_out:
            losses = [loss for loss, _ in self._val_losses][-CURVE_LINES:]
            texts.append(Text(f"{self.held_out.strip()} {curve(losses)}"))
        return Group(self._bar, *texts)


def plain(line: MetricsLine, steps: int) -> str:
    """A line of metrics as one line of text, for a file or a pipe."""
    return (
        f"loss {line.loss:.4f}{losses_of_teachers(line)}  {line.clips_per_s:.0f} clips/s  MFU {line.mfu:.1%}"
        f"  waits: data {line.data_wait_ms:.0f} ms, teacher {line.teacher_wait_ms:.0f} ms"
        f"  ETA {_eta(line, steps)}"
    )


def losses_of_teachers(line: MetricsLine) -> str:
    """The loss of each teacher in brackets; nothing with one."""
    losses = [f"{loss:.4f}" for name, loss in line.values().items() if name.startswith("loss_teacher")]
    return f" ({', '.join(losses)})" if losses else ""


def curve(values: list[float]) -> str:
    """The values as bars of eight heights, from the smallest to the largest of them."""
    low, high = min(values), max(values)
    return "".join(
        BARS[round((value - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0]
        for value in values
    )


def _eta(line: MetricsLine, steps: int) -> str:
    """Time to the last step at the speed of the newest line: h:mm:ss."""
    return str(timedelta(seconds=round((steps - line.step) * line.step_ms / 1000)))


def _named(name: str, value: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), value)


def _new_lines(path: Path, stop: threading.Event) -> Iterator[MetricsLine]:
    """Whole lines as they are written; ends after ``stop``, once the file has been read to its end. A start
    anew may have cut the file."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        last_round = stop.is_set()
        if path.exists():
            with path.open("rb") as file:
                position = min(position, file.seek(0, os.SEEK_END))
                file.seek(max(position - 1, 0))
                if (
                    position > 0 and file.read(1) != b"\n"
                ):  # cut, and grown beyond: on from the next whole line
                    position += len(file.readline())
                for raw in file:
                    if not raw.endswith(b"\n"):
                        break
                    position += len(raw)
                    yield MetricsLine.model_validate_json(raw)
        if last_round:
            return
        time.sleep(POLL_S)


def predicted(line: MetricsLine) -> str:
    """The accuracy that the held-out loss of a line predicts; nothing without one."""
    if line.predicted_accuracy is None:
        return ""
    return (
        f", predicted accuracy {line.predicted_accuracy:.3f} [{line.predicted_low:.3f},"
        f" {line.predicted_high:.3f}]"
    )
