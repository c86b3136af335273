"""The baseline, V-JEPA 2: predict the latents of a moving average of the encoder itself (arXiv:2509.24317,
Eq. 1)."""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from salt_distill.common.config import EmaConfig
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.teacher import TARGET_NORM_EPS
from salt_distill.common.model.vit import Encoder
from salt_distill.student_trainer.schedule import ema_momentum


class VJepa(nn.Module):
    """L1 between predicted latents and those of ``target_encoder``, which follows the encoder that learns and
    is the result (V-JEPA judges it)."""

    def __init__(self, encoder: Encoder, predictor: Predictor, *, ema: EmaConfig) -> None:
        super().__init__()
        self.encoder, self.predictor, self.ema = encoder, predictor, ema
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, pixels: UInt8[Tensor, "b t h w 3"], masks: MaskGroup) -> Float[Tensor, "sets b"]:
        """Loss of each clip of a mask group under each mask set, in float32."""
        grid = self.encoder.grid_of(pixels)
        with torch.no_grad():
            latents = self.target_encoder(normalise(pixels))  # dense, once for all mask sets
            target = F.layer_norm(latents, latents.shape[-1:], eps=TARGET_NORM_EPS)
        losses = []
        for set_idx, mask in enumerate(masks.sets):
            visible = self.encoder.visible(pixels, mask.visible_idx)
            predicted = self.predictor(
                visible, mask.visible_idx, mask.hidden_idx, grid=grid, mask_set=set_idx
            )
            hidden = target.take_along_dim(mask.hidden_idx[..., None], dim=1)
            losses.append((predicted.float() - hidden).abs().mean((1, 2)))
        return torch.stack(losses)

    def move_target_encoder(self, *, step: int, steps: int) -> None:
        """To be called after the optimizer's ``step`` of ``steps``: target = momentum * target + (1 -
        momentum) * encoder."""
        average = get_ema_multi_avg_fn(ema_momentum(self.ema, step=step, steps=steps))
        average(list(self.target_encoder.parameters()), list(self.encoder.parameters()), None)
