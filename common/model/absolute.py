"""A video ViT with absolute positions: VideoMAE's, MVD's, V-JEPA 1's."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from salt_distill.common.model.frozen import AbsoluteConfig
from salt_distill.common.model.grid import cubes, grid_of
from salt_distill.common.model.vit import Block, Norm, Stack


class AbsoluteEncoder(nn.Module):
    """Normalised clips to tokens."""

    positions: Tensor
    unturned: Tensor
    """A rotation by no angle: its blocks are ours."""

    def __init__(self, config: AbsoluteConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(3 * config.tubelet_size * config.patch_size**2, config.width)
        stored = config.positions == "stored"
        table = torch.zeros if stored else sine_table
        self.register_buffer("positions", table(config.num_tokens, config.width), persistent=stored)
        self.register_buffer("unturned", no_rotation(), persistent=False)
        self.blocks = Stack(
            Block(config.width, config.num_heads, config.mlp_width, config.block_eps)
            for _ in range(config.depth)
        )
        self.norm: nn.Module = (
            nn.Identity() if config.norm_eps is None else Norm(config.width, eps=config.norm_eps)
        )

    def forward(
        self, clip: Float[Tensor, "b 3 t h w"], token_idx: Int[Tensor, "b v"] | None = None
    ) -> Float[Tensor, "b v d"]:
        """Tokens of the whole clip, time-major, or of the named cubes, which then see no others. Raises
        ValueError for a clip of another size than its own."""
        config = self.config
        grid = grid_of(clip, patch_size=config.patch_size, tubelet_size=config.tubelet_size)
        if grid.num_tokens != config.num_tokens or grid.h != grid.w:
            raise ValueError(
                f"got clips of {grid.t}x{grid.h}x{grid.w} tokens for an encoder with absolute positions,"
                f" expected {config.num_tokens} of a square clip, whose positions it was trained with: leave"
                " --num-frames and --crop-size as the checkpoint says"
            )
        pixels = cubes(clip, token_idx, patch_size=config.patch_size, tubelet_size=config.tubelet_size)
        positions = self.positions if token_idx is None else self.positions[token_idx]
        rope = self.unturned.expand(-1, 1, 1, pixels.shape[1], config.width // config.num_heads)
        return self.norm(self.blocks(self.patch_embed(pixels.flatten(2)) + positions, rope).float())


def no_rotation() -> Float[Tensor, "2 1 1 1 1"]:
    """The rotary table of a rotation by no angle, to be expanded over tokens and channels of a head."""
    return torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1)


def sine_table(num_tokens: int, width: int) -> Float[Tensor, "n d"]:
    """Sines in the even channels and cosines in the odd ones, of a token's number over 10000 ** (2 (channel
    // 2) / width)."""
    angle = np.arange(num_tokens)[:, None] / 10_000 ** (2 * (np.arange(width) // 2) / width)
    return torch.from_numpy(np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle))).float()
