"""Kernels of a teacher's forward and of a student's step, counted on fake tensors, and the speed that a GPU
which is not here would have at least; nothing of it is measured."""

from collections import Counter

import torch
import torch.nn.functional as F

from salt_distill.common.config import MASK_GROUP_SIZE, FlopsConfig, GpuName
from salt_distill.common.model.compute import cast_products
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.roofline import GPUS, WORST, Kernel, Kernels, fake_tensors, seconds
from salt_distill.common.model.vit import Encoder


def slowest_clips_per_s(launches: Counter[Kernel], gpu: GpuName) -> float:
    """Clips of a mask group over the time of its kernels at the slow end of the roofline."""
    return MASK_GROUP_SIZE / seconds(launches, GPUS[gpu], WORST)


def teacher_kernels(sizes: FlopsConfig) -> Counter[Kernel]:
    """A frozen teacher's dense forward of as many clips as a mask group has, in bfloat16."""
    with fake_tensors(), Kernels() as kernels, torch.no_grad():
        encoder = Encoder(sizes.encoder)
        cast_products(encoder)
        kernels.launches.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = encoder(normalise(_clips(sizes)))
        F.layer_norm(tokens, tokens.shape[-1:]).half()
    return kernels.launches


def student_kernels(sizes: FlopsConfig, target_width: int) -> Counter[Kernel]:
    """A student's and its predictor's forward and backward over one mask group, in bfloat16. The optimizer is
    left out: its bytes are the same however many clips a step has."""
    grid = token_grid(sizes.view, sizes.encoder)
    masks = mask_group(sizes.mask, grid, seed=0, step=1, group=0, batch_size=MASK_GROUP_SIZE)
    with fake_tensors(), Kernels() as kernels:
        encoder = Encoder(sizes.encoder)
        predictor = Predictor(
            sizes.predictor,
            in_width=sizes.encoder.width,
            out_width=target_width,
            num_mask_tokens=len(masks.sets),
            rope=sizes.encoder.rope,
            norm_eps=sizes.encoder.norm_eps,
        )
        kernels.launches.clear()
        loss = torch.zeros(())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for set_idx, mask in enumerate(masks.sets):
                visible = encoder.visible(_clips(sizes), mask.visible_idx)
                predicted = predictor(visible, mask.visible_idx, mask.hidden_idx, grid=grid, mask_set=set_idx)
                target = torch.empty(predicted.shape, dtype=torch.float16)
                loss = loss + (predicted.float() - target.float()).abs().mean()
        loss.backward()
    return kernels.launches


def _clips(sizes: FlopsConfig) -> torch.Tensor:
    return torch.empty(MASK_GROUP_SIZE, *sizes.view.clip_shape, dtype=torch.uint8)
