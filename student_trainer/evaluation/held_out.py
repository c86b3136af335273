"""The loss of checkpoints on clips that no run has learned from, all under the same masks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from salt_distill.common.config import MASK_GROUP_SIZE
from salt_distill.common.model.checkpoint import CheckpointConfig, load_predictor, load_vit, read_config
from salt_distill.common.model.masking import MaskGroup, MaskSet, mask_group
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun
from salt_distill.student_trainer.objective import Objective
from salt_distill.student_trainer.salt import Salt
from salt_distill.student_trainer.vpixel import VPixel


def checkpoints(run: FinishedRun) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(
        (run.path / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-"))
    )


def targets_of(
    teacher: Teacher, clips: UInt8[np.ndarray, "b t h w 3"], batch_size: int
) -> Float[Tensor, "b n d"]:
    """The teacher's latents of every clip, in the host's memory: all checkpoints are held against them."""
    return torch.cat(
        [
            teacher.forward(clips[first : first + batch_size]).cpu()
            for first in range(0, len(clips), batch_size)
        ]
    )


@torch.inference_mode()
def held_out_loss(
    objective: Objective,
    clips: UInt8[np.ndarray, "b t h w 3"],
    config: CheckpointConfig,
    *,
    seed: int,
    targets: Float[Tensor, "b n d"] | None,
    device: torch.device,
) -> float:
    """The training loss, of these clips, under masks that ``seed`` draws: the mean over clips and mask
    sets."""
    objective = objective.to(device).eval()
    losses = []
    for rows, masks in _groups(len(clips), config, seed, device):
        pixels = torch.from_numpy(clips[rows]).to(device)
        inputs = (pixels, masks) if targets is None else (pixels, masks, targets[rows].to(device))
        losses.append(objective(*inputs).double())
    return float(torch.cat(losses, dim=1).mean())


def student_loss(
    checkpoint: Path,
    clips: UInt8[np.ndarray, "b t h w 3"],
    *,
    seed: int,
    targets: Float[Tensor, "b n d"],
    device: torch.device,
) -> float:
    """L1 of a student to its teacher's latents."""
    objective = Salt(load_vit(checkpoint), load_predictor(checkpoint))
    return held_out_loss(objective, clips, read_config(checkpoint), seed=seed, targets=targets, device=device)


def vpixel_loss(
    checkpoint: Path,
    clips: UInt8[np.ndarray, "b t h w 3"],
    *,
    pixel_norm: str,
    seed: int,
    device: torch.device,
) -> float:
    """Mean squared error of a V-Pixel teacher's own training."""
    objective = VPixel(load_vit(checkpoint), load_predictor(checkpoint), pixel_norm=pixel_norm)
    return held_out_loss(objective, clips, read_config(checkpoint), seed=seed, targets=None, device=device)


def _groups(
    num_clips: int, config: CheckpointConfig, seed: int, device: torch.device
) -> Iterator[tuple[slice, MaskGroup]]:
    for number in range(-(-num_clips // MASK_GROUP_SIZE)):
        masks = mask_group(config.mask, config.grid, seed=seed, step=0, group=number, batch_size=num_clips)
        sets = (
            MaskSet(visible_idx=one.visible_idx.to(device), hidden_idx=one.hidden_idx.to(device))
            for one in masks.sets
        )
        yield slice(masks.first, masks.first + masks.size), replace(masks, sets=tuple(sets))
