"""`salt-eval physics`: how often a model is more surprised by the impossible video of a pair."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import PhysicsConfig
from salt_distill.common.console import console
from salt_distill.common.model.checkpoint import read_config
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.physics.benchmarks import FRAME_STEP, LAYOUTS, Pair, read_pair
from salt_distill.student_trainer.evaluation.physics.surprise import Model, open_student, surprise
from salt_distill.student_trainer.evaluation.probe.score import Score

FILTERED = "filtered"
"""The least surprise of all context lengths at each window: no length has to be chosen."""
HOWS = ("average", "maximum")
"""Over the windows of a video (Eq. 3)."""
_MAX_BAD = 0.05
"""Share of the pairs whose videos may be unreadable."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The surprise at both videos of a pair, ``[contexts, windows]``."""

    pair: Pair
    possible: np.ndarray
    impossible: np.ndarray

    def right(self, row: int | None, how: str) -> bool:
        """Whether the impossible video surprises more, strictly; ``row``: a context length, or None for
        FILTERED."""
        sides = [side.min(0) if row is None else side[row] for side in (self.possible, self.impossible)]
        possible, impossible = (side.mean() if how == "average" else side.max() for side in sides)
        return bool(possible < impossible)


Accuracies = Mapping[str, Mapping[str, Mapping[str, Score]]]
"""How -> context length or FILTERED -> property -> pairs judged right."""


def run(config: PhysicsConfig) -> None:
    """Judges every pair, prints the table, writes the file."""
    torch.set_num_threads(config.num_threads)
    view, encoder = read_config(config.ckpt).view, read_config(config.ckpt).encoder
    window = config.window or view.num_frames * (2 if config.benchmark == "inflevel" else 1)
    contexts = list(config.context) or context_lengths(window, encoder.tubelet_size)
    wrong = [frames for frames in (*contexts, window) if frames % encoder.tubelet_size or frames > window]
    if wrong or max(contexts) >= window:
        raise ValueError(
            f"got windows of {window} frames with contexts of {contexts}, expected multiples of"
            f" {encoder.tubelet_size} frames, contexts shorter than the window: set --window, --context"
        )
    pairs = LAYOUTS[config.benchmark](Path(config.data))
    if not pairs:
        raise ValueError(
            f"{config.data}: got no pairs of videos, expected the folders of {config.benchmark}"
            " (docs/evaluation.md)"
        )
    model = open_student(
        config.ckpt,
        config.teacher,
        window=window,
        crop_size=config.crop_size,
        batch_size=config.batch_size,
        num_threads=config.num_threads,
    )
    frame_step = config.frame_step or FRAME_STEP[config.benchmark]
    judged, skipped = judge(
        model,
        pairs,
        frame_step=frame_step,
        size=config.crop_size or view.crop_size,
        window=window,
        contexts=contexts,
        stride=config.stride,
        batch_size=config.batch_size,
    )
    for name, reason in skipped.items():
        console.print(f"left out: {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    found = accuracies(judged, contexts)
    protocol = (
        f"one frame in {frame_step}, windows of {window}, a window every {config.stride}, contexts of"
        f" {', '.join(map(str, contexts))} frames"
    )
    _write(Path(config.out), found, judged, contexts, skipped, protocol)
    Console().print(table(found, protocol))


def context_lengths(window: int, tubelet_size: int) -> list[int]:
    """2, 4, 6, 8 and 10 frames of 16, and as much of other windows, in whole tokens."""
    return sorted(
        {max(1, round(window * eighths / 8 / tubelet_size)) * tubelet_size for eighths in range(1, 6)}
    )


def judge(
    model: Model,
    pairs: Sequence[Pair],
    *,
    frame_step: int,
    size: int,
    window: int,
    contexts: list[int],
    stride: int,
    batch_size: int,
) -> tuple[list[Judged], dict[str, str]]:
    """The surprise at each pair, and why some were left out. Raises ValueError where those are many, or
    videos are too short for a window."""
    judged, skipped = [], {}
    for pair in track(
        pairs, description="surprise", console=console, transient=True, disable=not console.is_terminal
    ):
        try:
            videos = read_pair(pair, frame_step, size)
        except BadVideoError as error:
            skipped[pair.name] = str(error)
            if len(skipped) > max(1, _MAX_BAD * len(pairs)):
                raise ValueError(
                    f"got {len(skipped)} pairs of {len(pairs)} that cannot be read, the last is {pair.name}:"
                    f" {error}"
                ) from error
            continue
        if len(videos[0]) < window:
            raise ValueError(
                f"{pair.name}: got {len(videos[0])} frames with a step of {frame_step}, expected at least a"
                f" window of {window}: set --window or --frame-step"
            )
        possible, impossible = (
            surprise(model, video, window=window, contexts=contexts, stride=stride, batch_size=batch_size)
            for video in videos
        )
        judged.append(Judged(pair=pair, possible=possible, impossible=impossible))
    return judged, skipped


def accuracies(judged: Sequence[Judged], contexts: Sequence[int]) -> Accuracies:
    """The relative accuracy: the share of pairs whose impossible video surprises more."""
    properties = sorted({one.pair.property for one in judged})
    rows: dict[str, int | None] = {str(context): row for row, context in enumerate(contexts)} | {
        FILTERED: None
    }
    return {
        how: {
            name: {
                of: Score(
                    num_correct=sum(one.right(row, how) for one in judged if one.pair.property == of),
                    num_clips=sum(one.pair.property == of for one in judged),
                )
                for of in properties
            }
            for name, row in rows.items()
        }
        for how in HOWS
    }


def macro(scores: Mapping[str, Score]) -> float:
    """The mean over properties."""
    return float(np.mean([score.accuracy for score in scores.values()]))


def best_context(found: Mapping[str, Mapping[str, Score]]) -> float:
    """The published headline: for each property the best of all rows, chosen on the very pairs it is reported
    on; then the mean."""
    properties = next(iter(found.values()))
    return float(np.mean([max(row[of].accuracy for row in found.values()) for of in properties]))


def table(found: Accuracies, protocol: str) -> Table:
    """A row for each property, a column for each context length: average surprise; then the means, and those
    of the maximum."""
    rows = found["average"]
    shown = Table(
        title="Relative accuracy, average surprise (chance 0.5)",
        caption=f"{protocol}; best: of all contexts, chosen on these pairs",
    )
    shown.add_column("property")
    for name in (*rows, "best"):
        shown.add_column(name, justify="right")
    for of, filtered in rows[FILTERED].items():
        interval = "  [dim]{:.2f}-{:.2f}[/]".format(*filtered.interval)
        cells = [
            f"{row[of].accuracy:.3f}{interval if name == FILTERED else ''}" for name, row in rows.items()
        ]
        shown.add_row(of, *cells, f"{max(row[of].accuracy for row in rows.values()):.3f}")
    shown.add_section()
    for how, scores in found.items():
        title = "mean" if how == "average" else "mean, maximum surprise"
        shown.add_row(
            title, *(f"[bold]{macro(row):.3f}[/]" for row in scores.values()), f"{best_context(scores):.3f}"
        )
    return shown


def _write(
    out: Path,
    found: Accuracies,
    judged: Sequence[Judged],
    contexts: Sequence[int],
    skipped: Mapping[str, str],
    protocol: str,
) -> None:
    result = {
        "protocol": protocol,
        "contexts": list(contexts),
        "fixed_context": {
            how: {name: macro(row) for name, row in rows.items()} for how, rows in found.items()
        },
        "best_context": {how: best_context(rows) for how, rows in found.items()},
        "best_context_note": (
            "for each property the best row, chosen on the pairs that it is reported on: the published"
            " headline"
        ),
        "accuracy": {
            how: {
                name: {
                    of: {"accuracy": score.accuracy, "interval": score.interval, "num_pairs": score.num_clips}
                    for of, score in row.items()
                }
                for name, row in rows.items()
            }
            for how, rows in found.items()
        },
        "surprise": {
            one.pair.name: {
                side: {"average": values.mean(1).tolist(), "maximum": values.max(1).tolist()}
                for side, values in (("possible", one.possible), ("impossible", one.impossible))
            }
            for one in judged
        },
        "skipped": dict(skipped),
    }
    write_whole(out, json.dumps(result, indent=2) + "\n")
