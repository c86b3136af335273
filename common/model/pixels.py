"""Pixels on their way into a model, or as its targets."""

import functools

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from salt_distill.common.model.grid import cubes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(
    pixels: UInt8[Tensor, "b t h w 3"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "b 3 t h w"]:
    """A model's input: RGB scaled to [0, 1], minus mean, over standard deviation."""
    shift, scale = _shift_and_scale(mean, std, pixels.device)
    return rearrange((pixels.float() - shift) / scale, "b t h w c -> b c t h w")


def normalised_cubes(cubes: UInt8[Tensor, "b v 3 u p q"]) -> Float[Tensor, "b v 3 u p q"]:
    """What ``normalise`` makes of the pixels of some tokens."""
    shift, scale = _shift_and_scale(IMAGENET_MEAN, IMAGENET_STD, cubes.device)
    return (cubes.float() - shift[:, None, None, None]) / scale[:, None, None, None]


@functools.cache  # a copy to a GPU would wait for all that the GPU has yet to do
def _shift_and_scale(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, device=device) * 255, torch.tensor(std, device=device) * 255


def pixel_targets(
    pixels: UInt8[Tensor, "b t h w 3"],
    token_idx: Int[Tensor, "b k"],
    *,
    patch_size: int,
    tubelet_size: int,
    norm: str,
) -> Float[Tensor, "b k upqc"]:
    """The normalised pixels of the named cubes, channel fastest.

    ``channel``: each channel of a cube has zero mean and unit variance, unbiased, 1e-6 added to the deviation
    (VideoMAE, which the paper's stage 1 is identical to, section 2.2). ``joint``: mean and variance over all
    pixels and channels of a cube as the model sees it, after ``normalise``, 1e-6 inside the root (MAE, whose
    loader normalises first).
    """
    sizes = {"patch_size": patch_size, "tubelet_size": tubelet_size}
    if norm == "joint":
        cube = rearrange(cubes(normalise(pixels), token_idx, **sizes), "b k c u p q -> b k (u p q c)")
        return (cube - cube.mean(-1, keepdim=True)) / (cube.var(-1, keepdim=True) + 1e-6).sqrt()
    # In whole values of 0 to 255 a flat cube's mean is exact; in [0, 1] its rounding error over 1e-6 would
    # become a target.
    clip = rearrange(pixels.float(), "b t h w c -> b c t h w")
    cube = rearrange(cubes(clip, token_idx, **sizes), "b k c u p q -> b k (u p q) c")
    return ((cube - cube.mean(-2, keepdim=True)) / (cube.std(-2, keepdim=True) + 255 * 1e-6)).flatten(2)
