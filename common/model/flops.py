"""Compute of training: the paper's 6ND (arXiv:2509.24317, Appendix F), and beside it every matrix product at
the true token counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import nn

from salt_distill.common.config import MASK_GROUP_SIZE, EncoderConfig, MaskConfig, PredictorConfig
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.masking import MaskGroup, mask_group
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.vit import Encoder

TRAIN_FLOPS = 6
"""FLOPs per parameter and token of a forward with its backward."""
FORWARD_FLOPS = 2
"""FLOPs per parameter and token of a forward."""
CONTEXT_FRACTION = 0.1
"""Share of the tokens that the encoder sees under a mask set, as the paper counts it. The masks keep more:
see ``kept_tokens``."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of the parts of a step, a clip or a run."""

    encoder: float
    """The student's encoder, forward and backward."""
    predictor: float
    """Forward and backward."""
    teacher: float
    """Forward alone."""
    attention: float = 0.0
    """What of the three is scores and values of attention; 6ND leaves them out."""

    @property
    def total(self) -> float:
        """All parts."""
        return self.encoder + self.predictor + self.teacher

    def __mul__(self, times: float) -> Self:
        """So many times the same."""
        return type(self)(
            encoder=self.encoder * times,
            predictor=self.predictor * times,
            teacher=self.teacher * times,
            attention=self.attention * times,
        )


def six_n_d(
    *,
    num_tokens: int,
    num_sets: int,
    encoder_parameters: int,
    predictor_parameters: int,
    teacher_parameters: int,
) -> Flops:
    """FLOPs of one clip of ``num_tokens`` tokens by the paper's rule.

    The encoder counts a tenth of the tokens once per mask set, the predictor all of them once per mask set, a
    teacher all of them once.
    """
    return Flops(
        encoder=TRAIN_FLOPS * encoder_parameters * num_sets * CONTEXT_FRACTION * num_tokens,
        predictor=TRAIN_FLOPS * predictor_parameters * num_sets * num_tokens,
        teacher=FORWARD_FLOPS * teacher_parameters * num_tokens,
    )


def step_flops(
    *,
    num_clips: int,
    num_tokens: int,
    encoder_parameters: int,
    predictor_parameters: int,
    teacher_parameters: int,
    mask: MaskConfig,
) -> float:
    """FLOPs of one optimizer step by the paper's rule."""
    clip = six_n_d(
        num_tokens=num_tokens,
        num_sets=len(mask.sets),
        encoder_parameters=encoder_parameters,
        predictor_parameters=predictor_parameters,
        teacher_parameters=teacher_parameters,
    )
    return num_clips * clip.total


def num_parameters(module: nn.Module) -> int:
    """Weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def encoder_parameters(config: EncoderConfig) -> int:
    """Weights of an encoder, counted on the model itself."""
    with torch.device("meta"):
        return num_parameters(Encoder(config))


def predictor_parameters(
    config: PredictorConfig, *, in_width: int, out_width: int, num_mask_tokens: int
) -> int:
    """Weights of a predictor, counted on the model itself."""
    with torch.device("meta"):
        predictor = Predictor(
            config,
            in_width=in_width,
            out_width=out_width,
            num_mask_tokens=num_mask_tokens,
            rope="vjepa2_tiled",
            norm_eps=1e-6,
        )
    return num_parameters(predictor)


# --- every matrix product ---


class KeptTokens(NamedTuple):
    """How many tokens a mask group keeps; the same for each of its clips."""

    num_clips: int
    visible: tuple[int, ...]
    """Context tokens of each mask set."""
    hidden: tuple[int, ...]
    """Target tokens of each mask set."""

    @classmethod
    def of(cls, group: MaskGroup) -> Self:
        """The counts of a mask group."""
        sets = group.sets
        return cls(
            group.size,
            tuple(s.visible_idx.shape[1] for s in sets),
            tuple(s.hidden_idx.shape[1] for s in sets),
        )


def kept_tokens(
    mask: MaskConfig, grid: TokenGrid, *, seed: int, batch_size: int, num_groups: int = 256
) -> list[KeptTokens]:
    """What the mask groups of a run's first steps keep: of whole steps, at least ``num_groups`` groups."""
    groups_per_step = -(-batch_size // MASK_GROUP_SIZE)
    steps = range(1, 1 + -(-num_groups // groups_per_step))
    return [
        KeptTokens.of(mask_group(mask, grid, seed=seed, step=step, group=group, batch_size=batch_size))
        for step in steps
        for group in range(groups_per_step)
    ]


def exact_flops(
    kept: Sequence[KeptTokens],
    *,
    num_tokens: int,
    encoder: EncoderConfig,
    predictor: PredictorConfig,
    out_width: int,
    teacher: EncoderConfig | None,
) -> Flops:
    """FLOPs of one clip, the mean over the clips of ``kept``: two for each multiplication of a matrix
    product, all others left out.

    A backward has two products for each of the forward's, except that nobody asks for the gradient of pixels.
    What activation checkpointing or a fused attention computes a second time is not counted: it is no part of
    the method.
    """
    visits = [
        (group.num_clips, visible, hidden)
        for group in kept
        for visible, hidden in zip(group.visible, group.hidden, strict=True)
    ]
    num_clips = sum(group.num_clips for group in kept)

    def mean(per_visit: Sequence[float]) -> float:
        return (
            math.fsum(clips * flops for (clips, _, _), flops in zip(visits, per_visit, strict=True))
            / num_clips
        )

    encoder_products = [encoder_forward(encoder, visible) for _, visible, _ in visits]
    predictor_products = [
        predictor_forward(
            predictor, in_width=encoder.width, out_width=out_width, num_visible=visible, num_hidden=hidden
        )
        for _, visible, hidden in visits
    ]
    pixels = [_patch_embed(encoder, visible) for _, visible, _ in visits]
    dense = Products(0, 0) if teacher is None else encoder_forward(teacher, num_tokens)
    return Flops(
        encoder=mean(
            [3 * products.total - pixel for products, pixel in zip(encoder_products, pixels, strict=True)]
        ),
        predictor=mean([3 * products.total for products in predictor_products]),
        teacher=dense.total,
        attention=mean(
            [
                3 * (e.attention + p.attention)
                for e, p in zip(encoder_products, predictor_products, strict=True)
            ]
        )
        + dense.attention,
    )


class Products(NamedTuple):
    """FLOPs of the matrix products of one clip's forward."""

    linear: int
    """Of the linear maps."""
    attention: int
    """Of attention's scores and values."""

    @property
    def total(self) -> int:
        """Both."""
        return self.linear + self.attention


def encoder_forward(config: EncoderConfig, num_tokens: int) -> Products:
    """An encoder over ``num_tokens`` tokens."""
    blocks = _blocks(config, num_tokens)
    return Products(_patch_embed(config, num_tokens) + blocks.linear, blocks.attention)


def predictor_forward(
    config: PredictorConfig, *, in_width: int, out_width: int, num_visible: int, num_hidden: int
) -> Products:
    """A predictor that sees ``num_visible`` tokens and predicts ``num_hidden``."""
    blocks = _blocks(config, num_visible + num_hidden)
    embed, head = 2 * num_visible * in_width * config.width, 2 * num_hidden * config.width * out_width
    return Products(embed + blocks.linear + head, blocks.attention)


def _patch_embed(config: EncoderConfig, num_tokens: int) -> int:
    return 2 * num_tokens * 3 * config.tubelet_size * config.patch_size**2 * config.width


def _blocks(config: EncoderConfig | PredictorConfig, num_tokens: int) -> Products:
    weights = 4 * config.width**2 + 2 * config.width * config.mlp_width  # query, key, value, out; up, down
    return Products(2 * num_tokens * config.depth * weights, 4 * num_tokens**2 * config.depth * config.width)
