"""A frozen encoder as everything downstream takes it: who made it does not matter there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from salt_distill.common.config import MAX_WIDTH, Config, EncoderConfig, ViewConfig
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.pixels import IMAGENET_MEAN, IMAGENET_STD


class TimmConfig(Config):
    """An architecture of timm that is applied to each frame; the rest of what a fingerprint says of an
    encoder."""

    timm: str
    """Its name there, with the tag of its weights."""
    width: int = Field(gt=0, le=MAX_WIDTH)
    """Channels of a token."""
    num_heads: PositiveInt
    """Attention heads."""
    patch_size: PositiveInt
    """Side of the square of a clip's pixels that gives a token."""
    tubelet_size: PositiveInt
    """Frames that give a token."""
    norm_eps: float | None
    """Epsilon of the final norm; none where the last block gives the tokens."""


class AbsoluteConfig(Config):
    """A ViT with absolute positions (VideoMAE, MVD, V-JEPA 1); the rest of what a fingerprint says of an
    encoder."""

    positions: Literal["sine", "stored"] = "sine"
    """Added to the tokens: sines of a token's number, or a table that comes with the weights."""
    width: int = Field(gt=0, le=MAX_WIDTH)
    """Channels of a token."""
    depth: PositiveInt
    """Transformer blocks."""
    num_heads: PositiveInt
    """Attention heads."""
    mlp_width: int = Field(gt=0, le=16 * MAX_WIDTH)
    """Hidden channels of a block's MLP."""
    patch_size: PositiveInt
    """Side of a patch, in pixels."""
    tubelet_size: PositiveInt
    """Frames of a patch."""
    num_tokens: int = Field(gt=0, le=100_000)
    """Of a clip: positions are numbers, so they mean nothing on another grid."""
    block_eps: PositiveFloat
    """Epsilon of the LayerNorms of its blocks."""
    norm_eps: float | None
    """Epsilon of the final norm; none where the last block gives the tokens."""


@dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """What an encoder is; its weights stay where they are until ``load``."""

    name: str
    """For people."""
    config: EncoderConfig | TimmConfig | AbsoluteConfig
    view: ViewConfig
    """The clips that it is given."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides RGB in [0, 1] after the mean."""
    init_std: float = 0.02
    """Standard deviation that its weights started with."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Versions of what computes its tokens beside torch."""
    load: Callable[[], nn.Module]
    """The module, in eval mode: normalised float ``[b, 3, t, h, w]`` to tokens ``[b, n, d]``, final norm
    included."""

    @property
    def grid(self) -> TokenGrid:
        """The token grid of a clip."""
        view, patch_size = self.view, self.config.patch_size
        return TokenGrid(
            view.num_frames // self.config.tubelet_size, view.height // patch_size, view.width // patch_size
        )
