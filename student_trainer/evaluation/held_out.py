"""The loss on clips that no run has learned from, under masks that stay: of checkpoints, or while a run
trains."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import MASK_GROUP_SIZE, MaskConfig
from salt_distill.common.model.checkpoint import CheckpointConfig, load_predictor, load_vit, read_config
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.masking import MaskGroup, mask_group
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.objective import Objective, of_teachers
from salt_distill.student_trainer.salt import Salt
from salt_distill.student_trainer.vpixel import VPixel


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


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


def held_out_masks(
    mask: MaskConfig, grid: TokenGrid, *, seed: int, num_clips: int, groups: range | None = None
) -> list[MaskGroup]:
    """The masks of clips that are held out: those of a step before the first. ``groups``: mask groups of a
    rank; None: all."""
    return [
        mask_group(mask, grid, seed=seed, step=0, group=group, batch_size=num_clips)
        for group in groups or range(-(-num_clips // MASK_GROUP_SIZE))
    ]


@torch.no_grad()
def clip_losses(
    objective: Objective,
    batch: Batch,
    targets: Sequence[Shaped[Tensor, "b n _"]],
    device: torch.device,
    num_passes: int | None = None,
) -> Float[Tensor, "teachers b"]:
    """The training loss of each clip for each teacher (one loss where there is none), the mean over the mask
    sets, in float64; 0 where one is bad. ``num_passes``: as ``Batch.groups`` takes it."""
    losses = [
        torch.stack(of_teachers(objective(*group.inputs).double(), len(targets))) * group.good
        for group in batch.groups(targets, device, num_passes)
    ]
    return torch.cat(losses, dim=1)[:, : len(batch.clips.good)]


def held_out_loss(
    objective: Objective,
    clips: UInt8[np.ndarray, "b t h w 3"],
    config: CheckpointConfig,
    *,
    seed: int,
    targets: Sequence[Float[Tensor, "b n d"]] = (),
    device: torch.device,
) -> float:
    """The training loss, of these clips, under masks that ``seed`` draws: the mean over clips and mask
    sets."""
    masks = held_out_masks(config.mask, config.grid, seed=seed, num_clips=len(clips))
    good = np.ones(len(clips), bool)
    batch = ClipBatch(pixels=clips, digests=(), keys=(), views=(), good=good)
    of_step = Batch(step=0, clips=batch, masks=masks)
    return float(clip_losses(objective.to(device), of_step, targets, device).mean())


def student_loss(
    checkpoint: Path,
    clips: UInt8[np.ndarray, "b t h w 3"],
    *,
    seed: int,
    teacher: str,
    targets: Float[Tensor, "b n d"],
    device: torch.device,
) -> float:
    """L1 of a student to the latents, ``targets``, of the teacher with this fingerprint."""
    objective = Salt(load_vit(checkpoint), load_predictor(checkpoint, teacher))
    config = read_config(checkpoint)
    return held_out_loss(objective, clips, config, seed=seed, targets=[targets], device=device)


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
    return held_out_loss(objective, clips, read_config(checkpoint), seed=seed, device=device)
