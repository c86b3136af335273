"""`salt-eval physics`: how often a model is more surprised by the impossible video of a pair."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import FrozenConfig, PhysicsConfig, ViewConfig
from salt_distill.common.console import console, new_results
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.frozen import AbsoluteConfig
from salt_distill.student_trainer.evaluation.physics.benchmarks import (
    FRAME_STEP,
    LAYOUTS,
    VideoPair,
    pairs_hash,
    read_pair,
)
from salt_distill.student_trainer.evaluation.physics.predictors import open_predictor
from salt_distill.student_trainer.evaluation.physics.results import (
    PairSurprise,
    PhysicsResults,
    accuracies,
    table,
)
from salt_distill.student_trainer.evaluation.physics.surprise import SurpriseModel, surprise

_MAX_BAD = 0.05
"""Share of the pairs whose videos may be unreadable."""


def run(config: PhysicsConfig) -> None:
    """Judges every pair, prints the table, writes the file."""
    torch.set_num_threads(config.num_threads)
    opened = open_encoder(FrozenConfig(ckpt=config.ckpt))
    tubelet_size = opened.config.tubelet_size
    has_own_length = isinstance(opened.config, AbsoluteConfig)  # positions for no other clip
    window = config.window or opened.view.num_frames * (
        2 if config.benchmark == "inflevel" and not has_own_length else 1
    )
    contexts = list(config.context) or context_lengths(window, tubelet_size)
    wrong = [frames for frames in (*contexts, window) if frames % tubelet_size or frames > window]
    if wrong or max(contexts) >= window:
        raise ValueError(
            f"got windows of {window} frames with contexts of {contexts}, expected multiples of"
            f" {tubelet_size} frames, contexts shorter than the window: set --window, --context"
        )
    pairs = LAYOUTS[config.benchmark](Path(config.data))
    if not pairs:
        raise ValueError(
            f"{config.data}: got no pairs of videos, expected the folders of {config.benchmark}"
            " (docs/evaluation.md)"
        )
    model = open_predictor(
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
        view=model.identity.view,
        window=window,
        contexts=contexts,
        stride=config.stride,
        batch_size=config.batch_size,
    )
    for name, reason in skipped.items():
        console.print(f"left out: {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    protocol = (
        f"one frame in {frame_step}, windows of {window}, a window every {config.stride}, contexts of"
        f" {', '.join(map(str, contexts))} frames"
    )
    PhysicsResults.of(
        judged,
        contexts,
        benchmark=config.benchmark,
        encoder=model.identity,
        teacher_fingerprint=model.teacher_fingerprint,
        run_fingerprint=model.run_fingerprint,
        index_hash=pairs_hash(pairs),
        protocol=protocol,
        skipped=skipped,
    ).write(Path(config.out))
    new_results().print(table(accuracies(judged, contexts), protocol))


def context_lengths(window: int, tubelet_size: int) -> list[int]:
    """2, 4, 6, 8 and 10 frames of 16, and as much of other windows, in whole tokens."""
    return sorted(
        {max(1, round(window * eighths / 8 / tubelet_size)) * tubelet_size for eighths in range(1, 6)}
    )


def judge(
    model: SurpriseModel,
    pairs: Sequence[VideoPair],
    *,
    frame_step: int,
    view: ViewConfig,
    window: int,
    contexts: list[int],
    stride: int,
    batch_size: int,
) -> tuple[list[PairSurprise], dict[str, str]]:
    """The surprise at each pair, and why some were left out. Raises ValueError where those are many, or
    videos are too short for a window."""
    judged, skipped = [], {}
    for pair in track(
        pairs, description="surprise", console=console, transient=True, disable=not console.is_terminal
    ):
        try:
            videos = read_pair(pair, frame_step, view)
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
        judged.append(PairSurprise(pair=pair, possible=possible, impossible=impossible))
    return judged, skipped
