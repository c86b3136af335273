"""Stage 2, SALT: predict the latents of a frozen teacher, or of several, at hidden positions
(arXiv:2509.24317, Eq. 1 with a static teacher)."""

from collections.abc import Iterable

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
        self, pixels: UInt8[Tensor, "b t h w 3"], masks: MaskGroup, *targets: Shaped[Tensor, "b n _"]
    ) -> Float[Tensor, "losses b"]:
        """Loss of each clip of a mask group under each mask set, in float32: those of the first teacher, then
        those of the next. ``targets``: of each teacher, packed (Note [packed]), of all n tokens, or at least
        of the hidden ones."""
        grid = self.encoder.grid_of(pixels)
        losses: list[list[Tensor]] = [[] for _ in targets]
        for set_idx, mask in enumerate(masks.sets):
            visible = self.encoder.visible(pixels, mask.visible_idx)
            predicted = self.predictor(
                visible, mask.visible_idx, mask.hidden_idx, grid=grid, mask_set=set_idx
            )
            hidden = [widen(target.take_along_dim(mask.hidden_idx[..., None], dim=1)) for target in targets]
            for of_teacher, (part, latents) in zip(losses, _parts(predicted, hidden), strict=True):
                of_teacher.append((part.float() - latents).abs().mean((1, 2)))
        return torch.stack([loss for of_teacher in losses for loss in of_teacher])


def _parts(
    predicted: Float[Tensor, "b k out"], hidden: list[Tensor]
) -> Iterable[tuple[Float[Tensor, "b k _"], Float[Tensor, "b k _"]]]:
    """What is predicted of each teacher's latents, with these (Note [heads])."""
    if len(hidden) == 1:
        return [(predicted, hidden[0])]
    widths = [latents.shape[-1] for latents in hidden]
    return zip(predicted.split(widths, dim=-1), hidden, strict=True)
