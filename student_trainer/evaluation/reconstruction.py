"""Pictures of what a run does to a real clip: its masks, and what stage 1 paints into them."""

import base64
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from salt_distill.common.model.checkpoint import CheckpointConfig
from salt_distill.common.model.grid import cubes
from salt_distill.common.model.masking import MaskGroup, MaskSet, mask_group
from salt_distill.common.model.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.vit import Encoder
from salt_distill.common.pictures import CONTEXT, DROPPED_COLOUR, png_bytes, spread_over_pixels, token_roles

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One clip under one mask set, every frame."""

    visible: UInt8[np.ndarray, "t h w 3"]
    """The input, hidden cubes grey."""
    prediction: UInt8[np.ndarray, "t h w 3"]
    """Visible cubes as in the input, predicted cubes with the input's own mean and deviation, dropped cubes
    grey."""


def masks_of(config: CheckpointConfig, *, seed: int, step: int, batch_size: int) -> MaskGroup:
    """The masks that a run drew for the first clips of a step."""
    return mask_group(config.mask, config.grid, seed=seed, step=step, group=0, batch_size=batch_size)


@torch.no_grad()
def reconstruct(
    clip: UInt8[np.ndarray, "t h w 3"],
    mask: MaskSet,
    row: int,
    set_idx: int,
    *,
    encoder: Encoder,
    predictor: Predictor,
    config: CheckpointConfig,
    pixel_norm: str,
    device: torch.device = _CPU,
) -> Reconstruction:
    """What a V-Pixel model paints into the hidden cubes of a clip.

    It predicts normalised pixels. They become colours with the mean and deviation of the input's own cube,
    which the model was never asked for: brightness and contrast of a cube are the input's, its pattern is the
    model's. ``device``: where the models are.
    """
    pixels = torch.from_numpy(clip)[None]
    visible_idx, hidden_idx = mask.visible_idx[row : row + 1], mask.hidden_idx[row : row + 1]
    seen, hidden = visible_idx.to(device), hidden_idx.to(device)
    visible = encoder(normalise(pixels.to(device), config.mean, config.std), seen)
    predicted = predictor(visible, seen, hidden, grid=config.grid, mask_set=set_idx).float().cpu()
    painted = _colours(predicted, pixels, hidden_idx, config, pixel_norm)

    roles = token_roles(mask, row, config.grid.num_tokens)
    role = spread_over_pixels(roles, config.grid, clip.shape[:3])
    hidden_away = np.where((role == CONTEXT)[..., None], clip, np.array(DROPPED_COLOUR, dtype=np.uint8))
    prediction = _paste(hidden_away, painted, hidden_idx[0].numpy(), config)
    return Reconstruction(visible=hidden_away, prediction=prediction)


def png(image: UInt8[np.ndarray, "h w 4"]) -> str:
    """The picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def _colours(
    predicted: Float[Tensor, "1 k upqc"],
    pixels: UInt8[Tensor, "1 t h w 3"],
    hidden_idx: Int[Tensor, "1 k"],
    config: CheckpointConfig,
    pixel_norm: str,
) -> Float[Tensor, "k u p q 3"]:
    """Undoes ``salt_distill.common.model.pixels.pixel_targets``: normalised pixels to RGB in [0, 1]."""
    sizes = {"patch_size": config.encoder.patch_size, "tubelet_size": config.encoder.tubelet_size}
    pattern = rearrange(predicted, "1 k (upq c) -> k upq c", c=3)
    clip = (
        normalise(pixels)
        if pixel_norm == "joint"
        else rearrange(pixels.float() / 255, "b t h w c -> b c t h w")
    )
    cube = rearrange(cubes(clip, hidden_idx, **sizes), "1 k c u p q -> k (u p q) c")
    if pixel_norm == "joint":
        flat = cube.flatten(1)
        seen = pattern * (flat.var(-1) + 1e-6).sqrt()[:, None, None] + flat.mean(-1)[:, None, None]
        colours = seen * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    else:
        colours = pattern * (cube.std(-2, keepdim=True) + 1e-6) + cube.mean(-2, keepdim=True)
    return rearrange(colours, "k (u p q) c -> k u p q c", u=sizes["tubelet_size"], p=sizes["patch_size"])


def _paste(
    clip: UInt8[np.ndarray, "t h w 3"],
    painted: Float[Tensor, "k u p q 3"],
    idx: Int[np.ndarray, " k"],
    config: CheckpointConfig,
) -> UInt8[np.ndarray, "t h w 3"]:
    grid, u, p = config.grid, config.encoder.tubelet_size, config.encoder.patch_size
    grouped = rearrange(clip.copy(), "(t u) (h p) (w q) c -> t h w u p q c", u=u, p=p, q=p)
    grouped[np.unravel_index(idx, grid)] = (painted * 255).round().clamp(0, 255).byte().numpy()
    return rearrange(grouped, "t h w u p q c -> (t u) (h p) (w q) c")
