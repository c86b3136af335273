"""Pictures of latents: principal components as colours, and how far a student's predictions agree with its
teacher's targets."""

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from torch import Tensor

from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.masking import MaskSet
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.vit import Encoder

TAILS = 0.02
"""Share of the tokens at either end of a component whose colour is cut off."""


def pca_colours(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n 3"]:
    """The first three principal components of all tokens of all clips, each from 0 to 1: red, green, blue.

    The components are those of this encoder on these clips: colours of two encoders do not compare, their
    patterns do. A component's sign, which means nothing, is the one that makes its largest weight positive.
    """
    flat = rearrange(tokens.double(), "b n d -> (b n) d")
    centred = flat - flat.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    directions = directions.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = centred @ (directions * largest.sign())
    low, high = components.quantile(TAILS, dim=0), components.quantile(1 - TAILS, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return rearrange(colours.float(), "(b n) c -> b n c", b=len(tokens))


@torch.inference_mode()
def agreement(
    clip: Float[Tensor, "1 c t h w"],
    target: Float[Tensor, "1 n d"],
    mask: MaskSet,
    row: int,
    set_idx: int,
    *,
    encoder: Encoder,
    predictor: Predictor,
    grid: TokenGrid,
) -> Float[Tensor, " n"]:
    """Cosine between the predicted and the target latent of every token that the mask hides; NaN
    elsewhere."""
    visible_idx, hidden_idx = mask.visible_idx[row : row + 1], mask.hidden_idx[row : row + 1]
    predicted = predictor(
        encoder(clip, visible_idx), visible_idx, hidden_idx, grid=grid, mask_set=set_idx
    ).float()
    wanted = target[0, hidden_idx[0]].float()
    cosine = torch.full((grid.num_tokens,), float("nan"))
    cosine[hidden_idx[0]] = torch.nn.functional.cosine_similarity(predicted[0], wanted, dim=-1)
    return cosine


def paint(
    colours: Float[Tensor, "n 3"], grid: TokenGrid, shape: tuple[int, ...]
) -> UInt8[np.ndarray, "t h w 3"]:
    """Each token's colour, from 0 to 1, over the pixels of its cube in a clip of ``shape`` (t, h, w)."""
    sizes = dict(
        zip("uvw", (extent // tokens for extent, tokens in zip(shape, grid, strict=True)), strict=True)
    )
    spread = repeat(colours.numpy(), "(t h q) c -> (t u) (h v) (q w) c", t=grid.t, h=grid.h, **sizes)
    return (255 * spread).round().astype(np.uint8)


def paint_agreement(
    cosine: Float[Tensor, " n"], clip: UInt8[np.ndarray, "t h w 3"], grid: TokenGrid
) -> UInt8[np.ndarray, "t h w 3"]:
    """Hidden tokens from dark (cosine 0 or less) to bright yellow (1), all others as the clip has them, in
    grey."""
    import matplotlib

    colours = torch.from_numpy(
        matplotlib.colormaps["viridis"](cosine.nan_to_num(0).clamp(0, 1).numpy())[:, :3]
    ).float()
    grey = repeat(clip.mean(-1), "t h w -> t h w c", c=3)
    hidden = paint(repeat((~cosine.isnan()).float(), "n -> n c", c=3), grid, clip.shape[:3]) > 0
    return np.where(hidden, paint(colours, grid, clip.shape[:3]), grey.round().astype(np.uint8))
