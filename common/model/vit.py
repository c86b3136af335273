"""The video ViT: encoder of teacher and student, and the blocks that the predictor shares."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salt_distill.common.config import EncoderConfig
from salt_distill.common.model.grid import TokenGrid, cubes, grid_of
from salt_distill.common.model.pixels import normalised_cubes
from salt_distill.common.model.rope import rope_table, rotate_queries_and_keys


class Norm(nn.LayerNorm):
    """LayerNorm that gives the type it takes: mean and variance of bfloat16 tokens are still computed in
    float32, inside its one kernel, and nothing is written in float32."""

    def forward(self, input: Float[Tensor, "*shape e"]) -> Float[Tensor, "*shape e"]:
        # Not `F.layer_norm`, for which autocast on a GPU makes a float32 copy of the tokens. The kernel there
        # wants weights of the tokens' type.
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return torch.native_layer_norm(input, list(self.normalized_shape), weight, bias, self.eps)[0]


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    explicit = False
    """Write softmax(q k^T) v out, instead of PyTorch's fused attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.w_qkv = nn.Linear(width, 3 * width)
        self.w_out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b v e"], rope: Float[Tensor, "2 #b 1 v head"]
    ) -> Float[Tensor, "b v e"]:
        qkv = rearrange(
            self.w_qkv(x), "b v (three heads head) -> three b heads v head", three=3, heads=self.num_heads
        )
        query, key, value = rotate_queries_and_keys(qkv, rope)
        if self.explicit:
            weight = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(
                -1, dtype=torch.float32
            )
            attended = weight.to(value.dtype) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value)
        return self.w_out(rearrange(attended, "b heads v head -> b v (heads head)"))


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.w_up = nn.Linear(width, hidden_width)
        self.w_down = nn.Linear(hidden_width, width)

    def forward(self, x: Float[Tensor, "b v e"]) -> Float[Tensor, "b v e"]:
        return self.w_down(F.gelu(self.w_up(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        self.attn_norm = Norm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads)
        self.mlp_norm = Norm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_width)

    def forward(
        self, x: Float[Tensor, "b v e"], rope: Float[Tensor, "2 #b 1 v head"]
    ) -> Float[Tensor, "b v e"]:
        x = x + self.attn(self.attn_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.ModuleList):
    """Blocks, one after the other."""

    checkpointing = False
    """Keep only what enters each block, and compute its inside again in the backward."""

    def forward(
        self, x: Float[Tensor, "b v e"], rope: Float[Tensor, "2 #b 1 v head"]
    ) -> Float[Tensor, "b v e"]:
        again = self.checkpointing and torch.is_grad_enabled()
        for block in self:  # no block draws random numbers
            x = (
                checkpoint(block, x, rope, use_reentrant=False, preserve_rng_state=False)
                if again
                else block(x, rope)
            )
        return x


class RopeTables(nn.Module):
    """Rotary tables of the grids met so far; holds no parameter."""

    def __init__(self, head_width: int, style: str) -> None:
        super().__init__()
        self.head_width, self.style = head_width, style
        self._tables: dict[tuple[TokenGrid, torch.device], Tensor] = {}

    def forward(
        self, grid: TokenGrid, token_idx: Int[Tensor, "b v"] | None, device: torch.device
    ) -> Float[Tensor, "2 #b 1 v head"]:
        table = self._tables.get((grid, device))
        if table is None:
            table = self._tables[grid, device] = rope_table(grid, self.head_width, self.style, device)
        return table[:, None, None] if token_idx is None else table[:, token_idx][:, :, None]


def init_weights(module: nn.Module, generator: torch.Generator, *, std: float) -> None:
    """Fills every parameter below ``module``: normal for weights (V-JEPA 2: std 0.02), cut at +-2, zero for
    biases, one for norms; the maps that end block i (from 1) of a stack are divided by sqrt(2 i) (V-JEPA 2,
    reference code)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=std, a=-2.0, b=2.0, generator=generator)
            nn.init.zeros_(child.bias)
        elif isinstance(child, Norm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
    with torch.no_grad():
        for stack in (child for child in module.modules() if isinstance(child, Stack)):
            for number, block in enumerate(stack, start=1):
                assert isinstance(block, Block)
                block.attn.w_out.weight.div_(math.sqrt(2.0 * number))
                block.mlp.w_down.weight.div_(math.sqrt(2.0 * number))


class Encoder(nn.Module):
    """Video ViT: normalised clips to tokens, the final LayerNorm included."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self._cube = {"patch_size": config.patch_size, "tubelet_size": config.tubelet_size}
        cube_width = 3 * config.tubelet_size * config.patch_size**2
        self.patch_embed = nn.Linear(
            cube_width, config.width
        )  # equals the Conv3d of V-JEPA 2: its weight, flattened
        self.rope = RopeTables(config.width // config.num_heads, config.rope)
        self.blocks = Stack(
            Block(config.width, config.num_heads, config.mlp_width, config.norm_eps)
            for _ in range(config.depth)
        )
        self.norm = Norm(config.width, eps=config.norm_eps)

    def forward(
        self, clip: Float[Tensor, "b 3 t h w"], token_idx: Int[Tensor, "b v"] | None = None
    ) -> Float[Tensor, "b v e"]:
        """Tokens of the whole clip, or of ``token_idx`` alone, which then see only each other."""
        cube = cubes(clip, token_idx, **self._cube)
        return self._encode(cube.flatten(2), token_idx, grid_of(clip, **self._cube))

    def grid_of(self, pixels: UInt8[Tensor, "b t h w 3"]) -> TokenGrid:
        """The token grid of a batch of clips. Raises ValueError where a clip is no whole number of cubes."""
        return grid_of(rearrange(pixels, "b t h w c -> b c t h w"), **self._cube)

    def visible(
        self, pixels: UInt8[Tensor, "b t h w 3"], token_idx: Int[Tensor, "b v"]
    ) -> Float[Tensor, "b v e"]:
        """``forward`` of normalised ``pixels`` and ``token_idx``, to the bit; cuts those tokens out as bytes,
        and normalises nothing else."""
        clip = rearrange(pixels, "b t h w c -> b c t h w")
        cube = normalised_cubes(cubes(clip, token_idx, **self._cube))
        return self._encode(cube.flatten(2), token_idx, self.grid_of(pixels))

    def _encode(
        self, cube: Float[Tensor, "b v cupq"], token_idx: Int[Tensor, "b v"] | None, grid: TokenGrid
    ) -> Float[Tensor, "b v e"]:
        rope = self.rope(grid, token_idx, cube.device)
        return self.norm(self.blocks(self.patch_embed(cube), rope).float())
