"""What the objectives share: see the visible tokens, predict the hidden ones, compare, for every mask set of
every clip."""

import abc

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from salt_distill.common.model.grid import grid_of
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.vit import Encoder


class Objective(nn.Module, abc.ABC):
    """An encoder and a predictor that learn from masked clips."""

    def __init__(self, encoder: Encoder, predictor: Predictor) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor

    @property
    def result(self) -> Encoder:
        """The encoder that a run is for: what is judged, served and exported."""
        return self.encoder

    def forward(
        self, pixels: UInt8[Tensor, "b t h w 3"], target: Float[Tensor, "b n d"] | None, masks: MaskGroup
    ) -> Float[Tensor, "sets b"]:
        """Loss of each clip of a mask group under each mask set, in float32. ``target`` is None where the
        targets do not come from outside."""
        clip = normalise(pixels)
        grid = grid_of(
            clip, patch_size=self.encoder.config.patch_size, tubelet_size=self.encoder.config.tubelet_size
        )
        losses = []
        for set_idx, mask in enumerate(masks.sets):
            visible = self.encoder(clip, mask.visible_idx)
            prediction = self.predictor(
                visible, mask.visible_idx, mask.hidden_idx, grid=grid, mask_set=set_idx
            )
            wanted = self.wanted(pixels, target, mask.hidden_idx)
            losses.append(self.distance(prediction.float(), wanted.float()).mean((1, 2)))
        return torch.stack(losses)

    @abc.abstractmethod
    def wanted(
        self,
        pixels: UInt8[Tensor, "b t h w 3"],
        target: Float[Tensor, "b n d"] | None,
        hidden_idx: Int[Tensor, "b k"],
    ) -> Float[Tensor, "b k out"]:
        """What the hidden tokens should be; carries no gradient."""

    @abc.abstractmethod
    def distance(
        self, prediction: Float[Tensor, "b k out"], wanted: Float[Tensor, "b k out"]
    ) -> Float[Tensor, "b k out"]:
        """How far a prediction is off, per value."""

    def after_step(self, *, step: int, steps: int) -> None:
        """Called when the optimizer has taken ``step`` of ``steps``, on every rank."""
