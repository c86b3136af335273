"""Stage 1, V-Pixel: masked pixel reconstruction under multi-block masks (arXiv:2509.24317, sections 2.2 and
5.2)."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from salt_distill.common.config import EncoderConfig
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.pixels import pixel_targets
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.vit import Encoder


def pixel_width(encoder: EncoderConfig) -> int:
    """Values of a cube of pixels: what the predictor's head gives in stage 1."""
    return 3 * encoder.tubelet_size * encoder.patch_size**2


class VPixel(nn.Module):
    """Mean squared error of the hidden cubes' normalised pixels; the encoder becomes the teacher."""

    def __init__(self, encoder: Encoder, predictor: Predictor, *, pixel_norm: str) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.pixel_norm = pixel_norm

    def forward(self, pixels: UInt8[Tensor, "b t h w 3"], masks: MaskGroup) -> Float[Tensor, "sets b"]:
        """Loss of each clip of a mask group under each mask set, in float32."""
        cube_size = {
            "patch_size": self.encoder.config.patch_size,
            "tubelet_size": self.encoder.config.tubelet_size,
        }
        grid = self.encoder.grid_of(pixels)
        losses = []
        for set_idx, mask in enumerate(masks.sets):
            visible = self.encoder.visible(pixels, mask.visible_idx)
            predicted = self.predictor(
                visible, mask.visible_idx, mask.hidden_idx, grid=grid, mask_set=set_idx
            )
            hidden = pixel_targets(pixels, mask.hidden_idx, norm=self.pixel_norm, **cube_size)
            losses.append((predicted.float() - hidden).square().mean((1, 2)))
        return torch.stack(losses)
