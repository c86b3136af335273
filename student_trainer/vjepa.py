"""The baseline, V-JEPA 2: predict the latents of a moving average of the encoder itself (arXiv:2509.24317,
Eq. 1)."""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from salt_distill.common.config import EmaConfig
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.teacher import TARGET_NORM_EPS
from salt_distill.common.model.vit import Encoder
from salt_distill.student_trainer.salt import Salt
from salt_distill.student_trainer.schedule import ema_momentum


class VJepa(Salt):
    """SALT, but for where the targets come from: an encoder that follows the one that learns, and that is the
    result (V-JEPA judges it)."""

    def __init__(self, encoder: Encoder, predictor: Predictor, *, ema: EmaConfig) -> None:
        super().__init__(encoder, predictor)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.ema = ema

    @property
    def result(self) -> Encoder:
        return self.target_encoder

    def forward(
        self, pixels: UInt8[Tensor, "b t h w 3"], target: Float[Tensor, "b n d"] | None, masks: MaskGroup
    ) -> Float[Tensor, "sets b"]:
        """See Objective; the targets are made here."""
        assert target is None
        with torch.no_grad():
            latents = self.target_encoder(normalise(pixels)).float()  # dense, once for all mask sets
            targets = F.layer_norm(latents, latents.shape[-1:], eps=TARGET_NORM_EPS)
        return super().forward(pixels, targets, masks)

    def after_step(self, *, step: int, steps: int) -> None:
        """Moves the target encoder towards the encoder."""
        average = get_ema_multi_avg_fn(ema_momentum(self.ema, step=step, steps=steps))
        average(list(self.target_encoder.parameters()), list(self.encoder.parameters()), None)
