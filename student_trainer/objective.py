"""What the objectives share: see the visible tokens, predict the hidden ones, compare, for every mask set of every clip."""

import abc

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from common.model.grid import grid_of
from common.model.masking import MaskGroup
from common.model.pixels import normalise
from common.model.predictor import Predictor
from common.model.vit import Encoder


class Objective(nn.Module, abc.ABC):
    """An encoder and a predictor that learn from masked clips."""

    def __init__(self, encoder: Encoder, predictor: Predictor) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor

    def forward(
        self, pixels: UInt8[Tensor, "b t h w 3"], target: Float[Tensor, "b n d"] | None, masks: list[MaskGroup]
    ) -> Float[Tensor, "sets b"]:
        """Loss of each clip under each mask set, in float32. ``masks`` cover the clips in order; ``target`` is None in stage 1."""
        size = {"patch_size": self.encoder.config.patch_size, "tubelet_size": self.encoder.config.tubelet_size}
        losses = []
        first = 0
        for group in masks:
            rows = slice(first, first + group.size)
            clip = normalise(pixels[rows])
            losses_of_sets = []
            for set_idx, mask in enumerate(group.sets):
                visible = self.encoder(clip, mask.visible_idx)
                prediction = self.predictor(visible, mask.visible_idx, mask.hidden_idx, grid=grid_of(clip, **size), mask_set=set_idx)
                wanted = self.wanted(pixels[rows], None if target is None else target[rows], mask.hidden_idx)
                losses_of_sets.append(self.distance(prediction.float(), wanted.float()).mean((1, 2)))
            losses.append(torch.stack(losses_of_sets))
            first += group.size
        return torch.cat(losses, dim=1)

    @abc.abstractmethod
    def wanted(
        self, pixels: UInt8[Tensor, "b t h w 3"], target: Float[Tensor, "b n d"] | None, hidden_idx: Int[Tensor, "b k"]
    ) -> Float[Tensor, "b k out"]:
        """What the hidden tokens should be; carries no gradient."""

    @abc.abstractmethod
    def distance(self, prediction: Float[Tensor, "b k out"], wanted: Float[Tensor, "b k out"]) -> Float[Tensor, "b k out"]:
        """How far a prediction is off, per value."""
