"""Rotary position embedding over time, height and width (V-JEPA 2, as arXiv:2509.24317 Appendix B uses
it)."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from salt_distill.common.model.grid import TokenGrid


def rope_table(
    grid: TokenGrid, head_width: int, style: str, device: torch.device
) -> Float[Tensor, "2 n head"]:
    """Cosines and sines of every token of the grid, in float32.

    Each of the axes time, height, width owns ``2 * (head_width // 3 // 2)`` channels in that order; what is
    left is not rotated. Channel m of an axis of width a turns with frequency ``10000 ** (-i / (a / 2))``,
    where i is ``m // 2`` for ``interleaved``, and ``m % (a / 2)`` for ``vjepa2_tiled``: there the two
    channels of a pair turn at different speeds, which V-JEPA 2's checkpoints expect.
    """
    axis_width = 2 * (head_width // 3 // 2)
    channel = torch.arange(axis_width, device=device)
    frequency_idx = channel // 2 if style == "interleaved" else channel % (axis_width // 2)
    frequency = 10_000.0 ** (-frequency_idx.float() / (axis_width / 2))
    axes = torch.meshgrid(
        *(torch.arange(size, device=device, dtype=torch.float32) for size in grid), indexing="ij"
    )
    angle = rearrange(
        [axis[..., None] * frequency for axis in axes], "thw_axis t h w a -> (t h w) (thw_axis a)"
    )
    angle = torch.nn.functional.pad(
        angle, (0, head_width - 3 * axis_width)
    )  # angle 0 leaves a channel as it is
    return torch.stack((angle.cos(), angle.sin()))


def rotate(
    x: Float[Tensor, "... v head"], table: Float[Tensor, "2 ... v head"]
) -> Float[Tensor, "... v head"]:
    """``x`` with each pair of neighbouring channels turned by its token's angles; computed in float32,
    returned in ``x.dtype``."""
    cos, sin = table[0], table[1]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)
