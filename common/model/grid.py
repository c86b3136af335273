"""The token grid of a clip: which cube of pixels is which token."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int, Shaped
from torch import Tensor

from salt_distill.common.config import EncoderConfig, ViewConfig


class TokenGrid(NamedTuple):
    """Tokens along time, height and width; token index = (t_idx * h + h_idx) * w + w_idx."""

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole clip."""
        return self.t * self.h * self.w


def token_grid(view: ViewConfig, encoder: EncoderConfig) -> TokenGrid:
    """The grid that an encoder cuts a clip into."""
    return TokenGrid(
        view.num_frames // encoder.tubelet_size,
        view.height // encoder.patch_size,
        view.width // encoder.patch_size,
    )


def grid_of(clip: Shaped[Tensor, "b c t h w"], *, patch_size: int, tubelet_size: int) -> TokenGrid:
    """The grid of a batch of clips. Raises ValueError where the clip is no whole number of cubes."""
    _, _, t, h, w = clip.shape
    if t % tubelet_size or h % patch_size or w % patch_size:
        raise ValueError(
            f"got clips of {t}x{h}x{w} (frames, height, width), expected multiples of"
            f" {tubelet_size}x{patch_size}x{patch_size}"
        )
    return TokenGrid(t // tubelet_size, h // patch_size, w // patch_size)


def cubes(
    clip: Shaped[Tensor, "b c t h w"],
    token_idx: Int[Tensor, "b v"] | None,
    *,
    patch_size: int,
    tubelet_size: int,
) -> Shaped[Tensor, "b v c u p q"]:
    """The pixels of the named tokens (None: of all, in order): channel, frame, row, column. Copies nothing
    but those tokens."""
    grid = grid_of(clip, patch_size=patch_size, tubelet_size=tubelet_size)
    grouped = rearrange(
        clip, "b c (t u) (h p) (w q) -> b t h w c u p q", u=tubelet_size, p=patch_size, q=patch_size
    )
    if token_idx is None:
        return rearrange(grouped, "b t h w c u p q -> b (t h w) c u p q")
    clip_idx = torch.arange(len(clip), device=clip.device)[:, None]
    return grouped[clip_idx, token_idx // (grid.h * grid.w), token_idx // grid.w % grid.h, token_idx % grid.w]
