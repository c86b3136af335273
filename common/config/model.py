"""Models, clips and masks."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from salt_distill.common.config.base import Config
from salt_distill.common.config.wrong_values import shown

Views = Literal["fresh"] | PositiveInt
TargetDtype = Literal["float16", "bfloat16", "int8"]
GpuName = Literal["a100", "h100", "h200", "b200", "4090", "l4"]
"""GPUs whose data sheet is known here."""
MASK_GROUP_SIZE = 24
"""Clips that share a block size and kept counts: the paper's per-GPU batch, 3072 / 128 (DESIGN section 4,
Masks)."""


MAX_DEPTH = 1000
"""Blocks of the deepest encoder that is built."""
MAX_WIDTH = 16_384
"""Channels of a token of the widest one."""


class EncoderConfig(Config):
    """A video ViT (arXiv:2509.24317, Table 3). Defaults: ViT-L."""

    width: int = Field(default=1024, gt=0, le=MAX_WIDTH)
    """Channels of a token."""
    depth: int = Field(default=24, gt=0, le=MAX_DEPTH)
    """Transformer blocks."""
    num_heads: PositiveInt = 16
    """Attention heads; the width is a multiple of it."""
    mlp_width: int = Field(default=4096, gt=0, le=16 * MAX_WIDTH)
    """Hidden channels of a block's MLP."""
    patch_size: PositiveInt = 16
    """Side of a patch, in pixels."""
    tubelet_size: PositiveInt = 2
    """Frames of a patch."""
    rope: Literal["vjepa2_tiled", "interleaved", "vjepa2_1"] = "vjepa2_tiled"
    """How rotary positions pair the channels. `vjepa2_tiled`: as V-JEPA 2 (the paper: identical to V-JEPA 2).
    `interleaved`: so that norms are preserved. `vjepa2_1`: also so, with rows and columns scaled to the 16 of
    a frame of 256 pixels, as V-JEPA 2.1."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every LayerNorm of the encoder."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        _check_heads("encoder", self.width, self.num_heads)
        return self


class PredictorConfig(Config):
    """The narrow transformer that predicts hidden tokens (Table 4)."""

    width: PositiveInt = 384
    """Channels of a token inside the predictor."""
    depth: PositiveInt = 12
    """Transformer blocks."""
    num_heads: PositiveInt = 16
    """Attention heads; the width is a multiple of it."""
    mlp_width: PositiveInt = 1536
    """Hidden channels of a block's MLP."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        _check_heads("predictor", self.width, self.num_heads)
        return self


def _check_heads(name: str, width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(f"{name}.width={width} is no multiple of {name}.num_heads={num_heads}")
    if width // num_heads % 2:
        raise ValueError(
            f"{name}: got a head width of {width // num_heads}, expected an even one, since RoPE rotates"
            f" channels in pairs: choose {name}.width and {name}.num_heads so"
        )
    if width // num_heads < 6:
        raise ValueError(
            f"{name}: got a head width of {width // num_heads}, expected at least 6, so that each of RoPE's"
            f" three axes has two channels to rotate: lower {name}.num_heads"
        )


Sampling = Literal["step", "window"]


def _crop_size(value: Any) -> int | tuple[int, int]:
    """A square's side as one number, however it was written: equal clips are equal in every file."""
    sides = re.split(r"\s*[x,]\s*", value.strip("[ ]")) if isinstance(value, str) else value
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    pixels = [int(side) for side in sides if _PIXELS.fullmatch(str(side))]
    if not 0 < len(pixels) == len(sides) <= 2:
        raise ValueError(
            f"got {shown(value)}, expected height and width of a clip in pixels: one number, such as 224, or"
            " two, such as [64, 96]"
        )
    return pixels[0] if pixels[0] == pixels[-1] else (pixels[0], pixels[1])


_PIXELS = re.compile("[1-9][0-9]{0,5}")
CropSize = Annotated[int | tuple[int, int], BeforeValidator(_crop_size)]
"""Height and width of a clip, in pixels; one number where they are equal. 64x96 as a flag."""


class ViewConfig(Config):
    """Which clip a draw takes from a video (Table 5). Everything that decides a clip's bytes beside the draw
    itself."""

    num_frames: PositiveInt = 16
    """Frames of a clip."""
    frame_step: PositiveInt = 4
    """Frames of the video from one frame of the clip to the next."""
    sampling: Sampling = "step"
    """Every `frame_step`-th frame (0, 4, 8 ... 60), or frames spread evenly over a window of num_frames x
    frame_step, its end included (0, 4, 8, 12, 17 ... 63: V-JEPA's loader)."""
    crop_size: CropSize = 224
    """Height and width of a clip, in pixels: one number, or [HEIGHT, WIDTH]."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.3, 1.0)
    """Range of the crop's share of the frame's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.35)
    """Range of the crop's width over height, as a multiple of the clip's, drawn log-uniformly."""
    flip: bool = True
    """Mirror half of the clips left to right. Off where labels name directions."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"got scale={list(self.scale)}, expected the least and the largest share of a frame's area,"
                " at most 1"
            )
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"got ratio={list(self.ratio)}, expected the least width over height first")
        return self

    @property
    def height(self) -> int:
        """Of a clip, in pixels."""
        return self.crop_size if isinstance(self.crop_size, int) else self.crop_size[0]

    @property
    def width(self) -> int:
        """Of a clip, in pixels."""
        return self.crop_size if isinstance(self.crop_size, int) else self.crop_size[1]

    @property
    def size_text(self) -> str:
        """Height and width for people: 224, or 64x96."""
        return str(self.crop_size) if isinstance(self.crop_size, int) else f"{self.height}x{self.width}"

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, 3)."""
        return (self.num_frames, self.height, self.width, 3)


def is_whole_cubes(view: ViewConfig, *, tubelet_size: int, patch_size: int) -> bool:
    """Whether a clip is a whole number of cubes, along each of its sides."""
    return not (view.num_frames % tubelet_size or view.height % patch_size or view.width % patch_size)


def require_whole_cubes(view: ViewConfig, encoder: EncoderConfig) -> None:
    """Raises ValueError unless a clip is a whole number of the encoder's cubes."""
    if not is_whole_cubes(view, tubelet_size=encoder.tubelet_size, patch_size=encoder.patch_size):
        raise ValueError(
            f"got a clip of {view.num_frames} frames of {view.size_text} pixels, expected multiples of "
            f"encoder.tubelet_size={encoder.tubelet_size} and encoder.patch_size={encoder.patch_size}"
        )


class BlockSetConfig(Config):
    """One set of V-JEPA's multi-block masks: blocks of the token grid are hidden."""

    num_blocks: PositiveInt
    """Blocks hidden per clip; they may overlap."""
    area_fraction: float = Field(gt=0, le=1)
    """Share of one frame's patch grid that a block covers."""
    temporal_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the clip's time steps that a block covers."""
    aspect_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.5)
    """Range of a block's height over width, drawn uniformly."""
    max_temporal_keep: float = Field(default=1.0, gt=0, le=1)
    """Share of the clip's time steps, from the first, that may be visible; every later one is hidden. Below
    1: causal multi-block."""


class TubeSetConfig(Config):
    """One set of VideoMAE's random tube masks: places of the patch grid are hidden in every time step."""

    hidden_fraction: float = Field(gt=0, lt=1)
    """Share of the places that is hidden, rounded down to whole places (of 196, 0.9 hides 176)."""


MaskSetConfig = BlockSetConfig | TubeSetConfig


class MaskConfig(Config):
    """What the student sees and what it predicts. Default: V-JEPA's multi-block masks, short range and long
    range, both for every clip (Table 5)."""

    sets: tuple[MaskSetConfig, ...] = Field(
        default=(
            BlockSetConfig(num_blocks=8, area_fraction=0.15),
            BlockSetConfig(num_blocks=2, area_fraction=0.7),
        ),
        min_length=1,
    )
    """The mask sets; each is one forward of encoder and predictor."""
    truncate: Literal["first", "random"] = "first"
    """All clips of a mask group need the same number of tokens. Which tokens of a larger mask are kept: the
    `first` in time order (V-JEPA), or a `random` subset."""
