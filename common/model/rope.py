"""Rotary position embedding over time, height and width (V-JEPA 2, as arXiv:2509.24317 Appendix B uses
it)."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from salt_distill.common.model.grid import TokenGrid


def rope_table(
    grid: TokenGrid, head_width: int, style: str, device: torch.device
) -> Float[Tensor, "2 n head"]:
    """Cosines and signed sines of every token of the grid, in float32: ``rotate`` multiplies a channel by the
    first and its neighbour by the second, so the sine of an even channel is negated.

    Each of the axes time, height, width owns ``2 * (head_width // 3 // 2)`` channels in that order; what is
    left is not rotated. Channel m of an axis of width a turns with frequency ``10000 ** (-i / (a / 2))``,
    where i is ``m // 2`` for ``interleaved``, and ``m % (a / 2)`` for ``vjepa2_tiled``: there the two
    channels of a pair turn at different speeds, which V-JEPA 2's checkpoints expect. ``vjepa2_1`` is
    ``interleaved`` with the rows and columns of any grid spread over those of 16 x 16.
    """
    axis_width = 2 * (head_width // 3 // 2)
    channel = torch.arange(axis_width, device=device)
    frequency_idx = channel % (axis_width // 2) if style == "vjepa2_tiled" else channel // 2
    frequency = 10_000.0 ** (-frequency_idx.float() / (axis_width / 2))
    positions = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    if style == "vjepa2_1":
        positions[1:] = [position * 15 / max(1, len(position) - 1) for position in positions[1:]]
    axes = torch.meshgrid(*positions, indexing="ij")
    angle = rearrange(
        [axis[..., None] * frequency for axis in axes], "thw_axis t h w a -> (t h w) (thw_axis a)"
    )
    # Angle 0 leaves a channel as it is.
    angle = torch.nn.functional.pad(angle, (0, head_width - 3 * axis_width))
    sine = angle.sin()
    sine[:, ::2].neg_()
    return torch.stack((angle.cos(), sine))


def rotate(
    x: Float[Tensor, "... v head"], table: Float[Tensor, "2 ... v head"]
) -> Float[Tensor, "... v head"]:
    """``x`` with each pair of neighbouring channels turned by its token's angles; computed in float32,
    returned in ``x.dtype``."""
    wide = x.float()
    return (wide * table[0] + _neighbours(wide) * table[1]).to(x.dtype)


def rotate_queries_and_keys(
    qkv: Float[Tensor, "3 b heads v head"], table: Float[Tensor, "2 #b 1 v head"]
) -> tuple[Float[Tensor, "b heads v head"], Float[Tensor, "b heads v head"], Float[Tensor, "b heads v head"]]:
    """Queries and keys, both as ``rotate`` turns them, and values. Takes ``qkv`` for its own: what is turned
    is written over it."""
    if torch.compiler.is_compiling():  # a compiler makes one pass of ``rotate``
        query, key = rotate(qkv[:2], table[:, None])
        return query, key, qkv[2]
    return _RotateInPlace.apply(qkv, table)


class _RotateInPlace(torch.autograd.Function):
    """``rotate`` in three kernels, with nothing in float32 but one product. Turning is linear: its backward
    turns back, and needs nothing of what was turned."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        _turn(qkv[:2], table[0], table[1], out=qkv[:2])
        return qkv[0], qkv[1], qkv[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        cosine, sine = ctx.saved_tensors[0]
        b, heads, v, head = gradients[0].shape
        # In the layout that the linear map before it gives: nothing is copied on the way back.
        whole = gradients[0].new_empty(b, v, 3, heads, head).permute(2, 0, 3, 1, 4)
        for part in (0, 1):
            _turn(gradients[part], cosine, _neighbours(sine), out=whole[part])
        whole[2].copy_(gradients[2])
        return whole, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, *, out: Tensor) -> None:
    """Fills ``out``, which may be ``x``."""
    neighbours = _neighbours(x) * sine
    if out.dtype == torch.float32:
        # Product and sum are rounded one by one, as in ``rotate``: the same bits.
        torch.mul(x, cosine, out=out).add_(neighbours)
    else:
        torch.addcmul(neighbours, x, cosine, out=out)


def _neighbours(x: Float[Tensor, "... head"]) -> Float[Tensor, "... head"]:
    """For each channel the other one of its pair."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
