"""Pictures of clips and of what masks do to them."""

import io

import numpy as np
from einops import rearrange
from jaxtyping import Int, UInt8
from PIL import Image

from salt_distill.common.config import MaskSetConfig, TubeSetConfig
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.masking import MaskSet

CONTEXT, TARGET, DROPPED = 0, 1, 2
"""What a token is under a mask set: seen by the encoder, predicted, or neither (cut off when a mask group was
truncated)."""
TARGET_COLOUR = (217, 119, 6)
DROPPED_COLOUR = (100, 110, 120)
STRIP_HEIGHT = 128
"""Least height of a frame in a picture, in pixels; smaller frames are enlarged by a whole factor, without
smoothing."""
GAP = 6
"""Pixels between two frames of a strip."""


def token_roles(mask: MaskSet, row: int, num_tokens: int) -> Int[np.ndarray, " n"]:
    """CONTEXT, TARGET or DROPPED for every token of a clip."""
    roles = np.full(num_tokens, DROPPED)
    roles[mask.visible_idx[row].numpy()] = CONTEXT
    roles[mask.hidden_idx[row].numpy()] = TARGET
    return roles


def describe(mask_set: MaskSetConfig) -> str:
    """A mask set in words."""
    if isinstance(mask_set, TubeSetConfig):
        return f"tubes over {mask_set.hidden_fraction:.0%} of the frame"
    return f"{mask_set.num_blocks} blocks of {mask_set.area_fraction:.0%} of the frame"


def tint_masks(
    clip: UInt8[np.ndarray, "t h w 3"], roles: Int[np.ndarray, " n"], grid: TokenGrid
) -> UInt8[np.ndarray, "t h w 3"]:
    """The clip with its targets tinted and its dropped tokens greyed out; the context as it is."""
    role = spread_over_pixels(roles, grid, clip.shape[:3])
    tinted = clip.astype(np.float32)
    tinted[role == TARGET] = 0.25 * tinted[role == TARGET] + 0.75 * np.array(TARGET_COLOUR)
    tinted[role == DROPPED] = 0.1 * tinted[role == DROPPED] + 0.9 * np.array(DROPPED_COLOUR)
    return tinted.round().astype(np.uint8)


def strip(clip: UInt8[np.ndarray, "t h w 3"], tubelet_size: int) -> UInt8[np.ndarray, "rows columns 4"]:
    """The first frame of each tubelet side by side with transparent gaps, enlarged to at least
    STRIP_HEIGHT."""
    frames = clip[::tubelet_size]
    factor = max(1, -(-STRIP_HEIGHT // frames.shape[1]))
    opaque = np.concatenate((frames, np.full((*frames.shape[:3], 1), 255, dtype=np.uint8)), axis=3)
    enlarged = opaque.repeat(factor, axis=1).repeat(factor, axis=2)
    gap = np.zeros((len(frames), enlarged.shape[1], GAP, 4), dtype=np.uint8)
    return rearrange(np.concatenate((enlarged, gap), axis=2), "t h w c -> h (t w) c")[:, :-GAP]


def png_bytes(image: UInt8[np.ndarray, "rows columns c"]) -> bytes:
    """The picture as a PNG file; three channels, or four with transparency."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def spread_over_pixels(
    roles: Int[np.ndarray, " n"], grid: TokenGrid, shape: tuple[int, ...]
) -> Int[np.ndarray, "t h w"]:
    """The role of each pixel of a clip of ``shape`` (t, h, w)."""
    sizes = [extent // tokens for extent, tokens in zip(shape, grid, strict=True)]
    spread = roles.reshape(grid)
    for axis, size in enumerate(sizes):
        spread = spread.repeat(size, axis=axis)
    return spread
