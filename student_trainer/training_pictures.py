"""Pictures of one clip while a run trains: what its masks hide, and in stage 1 what is painted there."""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch.distributed.fsdp import FSDPModule

from salt_distill.common.config import TrainConfig
from salt_distill.common.model.checkpoint import CheckpointConfig
from salt_distill.common.model.compute import uses_bfloat16
from salt_distill.common.model.masking import MaskSet
from salt_distill.common.pictures import describe, strip, tint_masks, token_roles
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.evaluation.reconstruction import reconstruct
from salt_distill.student_trainer.objective import Objective
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.vpixel import VPixel

_GAP = 6
"""Rows of pixels between two strips."""


@dataclass(frozen=True, kw_only=True)
class TrainingPicture:
    """The clip under one mask set, from top to bottom: the input; then what is hidden, tinted, or in stage 1
    the visible input and the prediction. The first frame of each tubelet, side by side."""

    tag: str
    """As TensorBoard and Weights & Biases call it."""
    caption: str
    image: UInt8[np.ndarray, "rows columns 3"]


@dataclass(frozen=True)
class _Example:
    """The clip, and its masks."""

    pixels: UInt8[np.ndarray, "t h w 3"]
    sets: list[MaskSet]
    """Of one row."""


class TrainingPictures:
    """Takes the first clip of this rank's first batch, with its masks, and shows it again every
    ``pictures_every`` steps. Every rank has one and calls it at every step: all take part in the forward of a
    sharded model."""

    def __init__(
        self, config: TrainConfig, worker: Worker, objective: Objective, checkpoint_config: CheckpointConfig
    ) -> None:
        self._every, self._compute = config.pictures_every, config.compute
        self._worker, self._objective, self._config = worker, objective, checkpoint_config
        self._example: _Example | None = None

    def after(self, batch: Batch) -> tuple[list[TrainingPicture], float]:
        """The pictures after a step, and the seconds that they took; none between them."""
        if self._every is None:
            return [], 0.0
        self._example = self._example or _example_of(batch)
        if batch.step % self._every:
            return [], 0.0
        since = time.perf_counter()
        example = self._example
        pictures = [self._picture(example, number) for number in range(len(example.sets))]
        return pictures, time.perf_counter() - since

    def _picture(self, example: _Example, set_idx: int) -> TrainingPicture:
        mask, mask_set = example.sets[set_idx], self._config.mask.sets[set_idx]
        tubelet = self._config.encoder.tubelet_size
        rows = [strip(clip, tubelet) for clip in (example.pixels, *self._masked(example, mask, set_idx))]
        gap = np.zeros((_GAP, *rows[0].shape[1:]), np.uint8)
        stacked = np.concatenate([part for row in rows for part in (row, gap)][:-1])
        return TrainingPicture(
            tag=f"pictures/mask_set_{set_idx + 1}",
            caption=describe(mask_set),
            image=np.where(stacked[..., 3:] == 0, np.uint8(255), stacked[..., :3]),
        )

    def _masked(
        self, example: _Example, mask: MaskSet, set_idx: int
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], ...]:
        objective, grid = self._objective, self._config.grid
        if not isinstance(objective, VPixel):
            return (tint_masks(example.pixels, token_roles(mask, 0, grid.num_tokens), grid),)
        device = self._worker.device
        is_sharded = isinstance(objective, FSDPModule)
        if is_sharded:
            objective.unshard()
        bfloat16 = uses_bfloat16(self._compute.dtype, device)
        with torch.autocast(device.type, dtype=torch.bfloat16) if bfloat16 else nullcontext():
            painted = reconstruct(
                example.pixels,
                mask,
                0,
                set_idx,
                encoder=objective.encoder,
                predictor=objective.predictor,
                config=self._config,
                pixel_norm=objective.pixel_norm,
                device=device,
            )
        if is_sharded:
            objective.reshard()
        return painted.visible, painted.prediction


def _example_of(batch: Batch) -> _Example:
    """The first good clip of a batch's first mask group; without one the first, so that every rank has
    one."""
    group = batch.masks[0]
    row = int(batch.clips.good[: group.size].argmax())
    rows = slice(row, row + 1)
    sets = [MaskSet(visible_idx=s.visible_idx[rows], hidden_idx=s.hidden_idx[rows]) for s in group.sets]
    return _Example(batch.clips.pixels[row].copy(), sets)
