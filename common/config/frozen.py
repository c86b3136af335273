"""Which frozen encoder, and which clips it is given."""

from pydantic import PositiveFloat, PositiveInt

from salt_distill.common.config.base import Config
from salt_distill.common.config.model import CropSize, Sampling, ViewConfig

TIMM, TIMM_RANDOM = "timm:", "timm-random:"
"""What a --ckpt begins with that names an architecture of timm: with its released weights, or with random
ones."""


class FrozenConfig(Config):
    """A frozen encoder, whoever trained it."""

    paths = ("ckpt",)

    ckpt: str
    """Run directory or checkpoint, Hugging Face VJEPA2 or VideoMAE directory, V-JEPA 2 `.pt` file, or the
    address of one in an object store, such as s3://BUCKET/RUNS/teacher; `timm:NAME`, or `timm-random:NAME`
    for random weights."""
    num_frames: PositiveInt | None = None
    """Frames of a clip; none: what the checkpoint says, 16 where it says nothing."""
    crop_size: CropSize | None = None
    """Height and width of a clip, in pixels; none: what the checkpoint says, 224 where it says nothing."""
    patch_size: PositiveInt | None = None
    """Patch size of the student, in pixels, for `timm:` only (16). Frames are resized so that the teacher has
    as many patches."""
    tubelet_size: PositiveInt | None = None
    """Frames of a token of the student, for `timm:` only (2). A token of the teacher is the mean of the
    tokens of these frames."""


class DrawConfig(Config):
    """How clips are drawn from videos, where that is not as the checkpoint says (a foreign one: not as in
    Table 5)."""

    frame_step: PositiveInt | None = None
    """Frames of the video from one frame of the clip to the next."""
    sampling: Sampling | None = None
    """Every `frame_step`-th frame, or frames spread evenly over a window."""
    scale: tuple[PositiveFloat, PositiveFloat] | None = None
    """Range of the crop's share of the frame's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] | None = None
    """Range of the crop's width over height, as a multiple of the clip's, drawn log-uniformly."""
    flip: bool | None = None
    """Mirror half of the clips left to right."""

    def over(self, view: ViewConfig) -> ViewConfig:
        """The view with what is given here."""
        return ViewConfig.model_validate(view.model_dump() | self.model_dump(exclude_none=True))
