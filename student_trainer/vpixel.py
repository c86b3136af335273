"""Stage 1, V-Pixel: masked pixel reconstruction under multi-block masks (arXiv:2509.24317, sections 2.2 and
5.2)."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from salt_distill.common.config import EncoderConfig
from salt_distill.common.model.pixels import pixel_targets
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.vit import Encoder
from salt_distill.student_trainer.objective import Objective


def pixel_width(encoder: EncoderConfig) -> int:
    """Values of a cube of pixels: what the predictor's head gives in stage 1."""
    return 3 * encoder.tubelet_size * encoder.patch_size**2


class VPixel(Objective):
    """Mean squared error of the hidden cubes' normalised pixels; the encoder becomes the teacher."""

    def __init__(self, encoder: Encoder, predictor: Predictor, *, pixel_norm: str) -> None:
        super().__init__(encoder, predictor)
        self.pixel_norm = pixel_norm

    @torch.no_grad()
    def wanted(
        self,
        pixels: UInt8[Tensor, "b t h w 3"],
        target: Float[Tensor, "b n d"] | None,
        hidden_idx: Int[Tensor, "b k"],
    ) -> Float[Tensor, "b k upqc"]:
        config = self.encoder.config
        return pixel_targets(
            pixels,
            hidden_idx,
            patch_size=config.patch_size,
            tubelet_size=config.tubelet_size,
            norm=self.pixel_norm,
        )

    def distance(
        self, prediction: Float[Tensor, "b k out"], wanted: Float[Tensor, "b k out"]
    ) -> Float[Tensor, "b k out"]:
        return (prediction - wanted).square()
