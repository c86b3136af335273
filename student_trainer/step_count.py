"""A step, and a teacher's forward, counted on fake tensors: their kernels and the memory at their peak."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import EncoderConfig, StudentRun, TrainConfig
from salt_distill.common.model.compute import cast_products, set_up
from salt_distill.common.model.flops import num_parameters
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import MaskGroup, group_idx, mask_group
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.roofline import Kernel, Kernels, PeakMemory, fake_tensors
from salt_distill.common.model.vit import Block, Encoder
from salt_distill.common.targets import codec
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.loop import update
from salt_distill.student_trainer.objective import Objective, uninitialised_objective
from salt_distill.student_trainer.optim import new_optimizer
from salt_distill.student_trainer.parallel import clip_gradients
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.vjepa import VJepa

NUM_DRAWN = 16
"""Steps whose masks are looked at: for the group that keeps the most tokens, and for one that keeps as many
as most do."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """A worker's step on one mask group after the other."""

    state_bytes: int
    """Weights, gradients and the optimizer's state."""
    peak_bytes: int
    """Most that tensors hold in a step: the state, and what the backward needs of one mask group."""
    largest_block_bytes: int
    """Weights of the largest block and its gradient: what a sharded model holds whole."""
    weight_bytes: int
    """Of what learns, in float32."""
    group: Counter[Kernel]
    """Forward and backward of one mask group."""
    optimizer: Counter[Kernel]
    """Once a step."""


@dataclass(frozen=True, kw_only=True)
class TeacherCount:
    """A teacher in the student's process."""

    width: int
    """Of its targets."""
    num_parameters: int
    peak_bytes: int
    """Of its weights, and what its forward holds."""
    batch_size: int
    forward: Counter[Kernel]
    """Of one batch."""


def count_step(config: TrainConfig, *widths: int) -> StepCount:
    """A worker's step on fake tensors: the loop's own, so that whatever changes there is counted. ``widths``:
    of each teacher."""
    workers = max(config.most_workers, 1)
    num_groups = min(2, len(group_idx(config.batch_size, 0, workers)))
    usual, largest = masks_of(config)
    with fake_tensors(), PeakMemory() as memory, Kernels() as kernels:
        objective = uninitialised_objective(config, *widths)
        set_up(objective, config.compute.model_copy(update={"compile": False}), CPU)
        optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
        step_once(objective, optimizer, config, [usual], widths)  # makes the optimizer's state
        kernels.launches.clear()
        step_once(objective, optimizer, config, [usual], widths)
        whole = kernels.launches.copy()
        kernels.launches.clear()
        clip_gradients(objective, config.optim, 1)
        optimizer.step()
        if isinstance(objective, VJepa):
            objective.move_target_encoder(step=1, steps=config.steps)
        once = kernels.launches.copy()
        memory.peak_bytes = state_bytes = memory.held_bytes
        step_once(objective, optimizer, config, [largest] * num_groups, widths)
        blocks = [module for module in objective.modules() if isinstance(module, Block)]
        learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        return StepCount(
            state_bytes=state_bytes,
            peak_bytes=memory.peak_bytes,
            largest_block_bytes=2 * max(sum(p.nbytes for p in block.parameters()) for block in blocks),
            weight_bytes=sum(parameter.nbytes for parameter in learning),
            group=whole - once,
            optimizer=once,
        )


def count_teacher(
    config: EncoderConfig, clip_shape: tuple[int, int, int, int], batch_size: int
) -> TeacherCount:
    """A frozen encoder's forward in bfloat16 on fake tensors."""
    with fake_tensors(), PeakMemory() as memory, Kernels() as kernels, torch.no_grad():
        encoder = Encoder(config)
        cast_products(encoder)
        weight_bytes = sum(parameter.nbytes for parameter in encoder.parameters())
        base = memory.held_bytes
        memory.peak_bytes = base
        kernels.launches.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = encoder(normalise(torch.empty(batch_size, *clip_shape, dtype=torch.uint8)))
        F.layer_norm(tokens, tokens.shape[-1:]).half()
        return TeacherCount(
            width=config.width,
            num_parameters=num_parameters(encoder),
            peak_bytes=memory.peak_bytes - base + weight_bytes,
            batch_size=batch_size,
            forward=kernels.launches.copy(),
        )


def step_once(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    masks: list[MaskGroup],
    widths: Sequence[int],
) -> None:
    """``widths``: of each teacher."""
    num_clips = sum(group.size for group in masks)
    clips = ClipBatch(
        pixels=np.empty((num_clips, *config.view.clip_shape), dtype=np.uint8),
        digests=(bytes(32),) * num_clips,
        keys=("",) * num_clips,
        views=(0,) * num_clips,
        good=np.ones(num_clips, dtype=bool),
    )
    targets = []
    if isinstance(config, StudentRun):
        num_tokens = token_grid(config.view, config.encoder).num_tokens
        targets = [codec.empty_packed(num_clips, num_tokens, width, config.target_dtype) for width in widths]
    batch = Batch(step=1, clips=clips, masks=masks)
    update(objective, optimizer, batch, targets, config, Worker(rank=0, world_size=1, device=CPU))


def masks_of(config: TrainConfig) -> tuple[MaskGroup, MaskGroup]:
    """Of the first steps' mask groups one that keeps as many tokens as most do, and the one that keeps the
    most."""
    grid = token_grid(config.view, config.encoder)
    groups = [
        mask_group(config.mask, grid, seed=config.seed, step=step, group=0, batch_size=config.batch_size)
        for step in range(1, 1 + NUM_DRAWN)
    ]
    groups.sort(key=lambda group: sum(s.visible_idx.shape[1] + s.hidden_idx.shape[1] for s in group.sets))
    return groups[len(groups) // 2], groups[-1]
