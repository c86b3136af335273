"""Stage 2, SALT: predict a frozen teacher's latents at hidden positions (arXiv:2509.24317, Eq. 1 with a
static teacher)."""

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.vit import Encoder
from salt_distill.common.targets.codec import widen


class Salt(nn.Module):
    """L1 between predicted and target latents. The targets come from outside: nothing of the teacher is in
    here."""

    def __init__(self, encoder: Encoder, predictor: Predictor) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor

    def forward(
        self, pixels: UInt8[Tensor, "b t h w 3"], masks: MaskGroup, target: Shaped[Tensor, "b n packed"]
    ) -> Float[Tensor, "sets b"]:
        """Loss of each clip of a mask group under each mask set, in float32. ``target``: packed (Note
        [packed]), of all n tokens, or at least of the hidden ones."""
        grid = self.encoder.grid_of(pixels)
        losses = []
        for set_idx, mask in enumerate(masks.sets):
            visible = self.encoder.visible(pixels, mask.visible_idx)
            predicted = self.predictor(
                visible, mask.visible_idx, mask.hidden_idx, grid=grid, mask_set=set_idx
            )
            hidden = widen(target.take_along_dim(mask.hidden_idx[..., None], dim=1))
            losses.append((predicted.float() - hidden).abs().mean((1, 2)))
        return torch.stack(losses)
