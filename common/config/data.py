"""Making, packing, mixing and inspecting videos: ``salt-data``."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from salt_distill.common.config.base import Config
from salt_distill.common.config.loader import LoaderConfig
from salt_distill.common.config.model import (
    MASK_GROUP_SIZE,
    EncoderConfig,
    MaskConfig,
    ViewConfig,
    require_whole_cubes,
)
from salt_distill.common.config.wrong_values import PngFile, matching, shown


class SynthConfig(Config):
    """`salt-data synth`: labelled videos made here, small enough to learn from on a CPU."""

    out: str
    """Folder for the videos and their labels.csv."""
    num_train: PositiveInt = 4000
    """Videos of the training split."""
    num_test: PositiveInt = 400
    """Videos of the test split; their digits were written by other people's hands."""
    seed: int = 0
    """Random seed of the videos."""
    size: int = Field(default=40, ge=36, multiple_of=2)
    """Height and width of a video, in pixels."""
    num_frames: int = Field(default=16, ge=8)
    """Frames of a video."""
    fps: PositiveFloat = 12.0
    """Frames per second."""

    @property
    def extras(self) -> tuple[str, ...]:
        return ("eval",)


class ScenesConfig(Config):
    """`salt-data scenes`: pairs of possible and impossible videos made here, in IntPhys's folders."""

    out: str
    """Folder for the scenes."""
    num_scenes: PositiveInt = 10
    """Scenes of each property, with two possible and two impossible videos each."""
    seed: int = 0
    """Random seed of the videos."""
    size: int = Field(default=64, ge=32)
    """Height and width of a video, in pixels."""
    num_frames: int = Field(default=100, ge=8)
    """Frames of a video."""


class PretextConfig(Config):
    """`salt-data pretext`: labelled clips of anybody's videos, whose labels are made from the clips
    themselves."""

    places = ("src", "out")

    src: str
    """Videos: a folder, a quoted glob or a list, as `salt-data pack` takes them."""
    out: str
    """Folder for the clips and their labels.csv."""
    num_pretrain: NonNegativeInt = 4000
    """Most clips of the split `pretrain`, to train encoders on: without any change. Each video gives the same
    number; a video in which little moves gives fewer."""
    num_train: PositiveInt = 4000
    """Most clips of the split `train`: from the same parts of the videos, changed as their labels say."""
    num_test: PositiveInt = 800
    """Most clips of the split `test`: from the end of each video, which the other splits do not show."""
    test_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of each video, at its end, that test clips are cut from."""
    seed: int = 0
    """Random seed of the clips."""
    size: int = Field(default=64, ge=16, multiple_of=2)
    """Height and width of a clip, in pixels. It shows a square as large as the shorter side of the
    video."""
    num_frames: int = Field(default=16, ge=4, multiple_of=2)
    """Frames of a clip."""
    min_change: NonNegativeFloat = 1.0
    """Smallest change from frame to frame, in pixel values of 0 to 255. Parts with less movement are left
    out, since nobody can tell their direction of time."""
    max_video_bytes: PositiveInt = 1_000_000_000
    """Largest video that is taken, in bytes."""
    timeout_s: PositiveFloat = 600.0
    """Longest that the clips of one video may take, in seconds."""


class PackConfig(Config):
    """`salt-data pack`: videos to WebDataset shards with an index."""

    places = ("src", "out")

    src: str
    """What to pack: a folder (with its subfolders; its labels.csv, where it has one), a quoted glob, or a
    list: a CSV file with a column `path` and one column per label, or V-JEPA's `path label` lines."""
    out: str
    """Folder for the shards; a second run on the same input gives the same bytes, and continues one that was
    killed."""
    name: Annotated[str, matching("[^/]+", "a name without /")] | None = None
    """Name of the data set in keys and file names. None: the name of the folder or list."""
    images: Literal["each", "frames"] | None = None
    """Images in a folder or glob. `each`: each image is a clip that stands still. `frames`: all images of a
    folder are the frames of one video. None: images are left out."""
    fps: PositiveFloat | None = None
    """Frames per second of frame folders, which do not state it."""
    label_from_folder: str | None = None
    """Name of a label whose classes are the folders that the videos lie in, as in SRC/abseiling/x.mp4."""
    split: str = "train"
    """Split of every video for which no list names one."""
    split_from_folder: bool = False
    """The first folder below SRC is the split, as in SRC/train/abseiling/x.mp4."""
    max_shard_bytes: PositiveInt = 1_000_000_000
    """Size at which a shard is full, in bytes."""
    max_video_bytes: int = Field(default=1_000_000_000, gt=0, lt=8 * 2**30)
    """Largest video that is packed, in bytes, since a reader has it in memory as a whole. Larger ones are
    skipped."""
    short_side: PositiveInt | None = None
    """Re-encode videos whose shorter side has more pixels, to this many. None: all videos keep their original
    bytes."""
    copies: Literal["fast", "small"] = "fast"
    """Kind of the copies that --short-side makes. `fast`: they decode fast from any frame (a key frame every
    16 frames; 1.8 times the clips a second for 1.3 times the bytes). `small`: without these."""
    max_bad_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of videos that may be unreadable before the command stops."""
    timeout_s: PositiveFloat = 600.0
    """Longest that one video may take to decode, in seconds; a longer one is skipped."""
    workers: PositiveInt | None = None
    """Processes that read videos. None: one per CPU."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.images == "frames" and self.fps is None:
            raise ValueError(
                "got --images frames without --fps, expected the frames per second of the folders: images do"
                " not state it"
            )
        if self.split_from_folder and self.split != "train":
            raise ValueError(f"got --split {self.split} with --split-from-folder, expected one of them")
        if self.copies != "fast" and self.short_side is None:
            raise ValueError(
                f"got --copies {self.copies} without --short-side, expected both: only copies have a kind"
            )
        return self


def _one_group(pattern: str | None) -> str | None:
    if pattern is not None:
        try:
            num_groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"got {shown(pattern)}, expected a regular expression: {error}") from error
        if num_groups != 1:
            raise ValueError(
                f"got {shown(pattern)} with {num_groups} groups, expected one: what it takes out of a key"
            )
    return pattern


Identity = Annotated[str | None, AfterValidator(_one_group)]
"""A regular expression with one group."""


class MixSource(Config):
    """One source of a mixture."""

    path: str
    """A data set that `salt-data pack` wrote, or tars that others packed; relative to the recipe."""
    name: Annotated[str, matching("[^/]+", "a name without /")] | None = None
    """Name in the mixture's table and keys; else the data set's own."""
    split: str = "train"
    """Split whose samples are taken; `all` takes every sample."""
    min_duration_s: NonNegativeFloat = 0.0
    """Shortest video that is taken, in seconds."""
    max_duration_s: PositiveFloat | None = None
    """Longest video that is taken, in seconds."""
    count: PositiveInt | None = None
    """Samples to draw; else all."""
    strata: PositiveInt = 1
    """Bins of equal width between the two durations; each gives the same number of samples, if it has so
    many."""
    identity: Identity = None
    """Regular expression whose group finds in a key what identifies the video, whatever its bytes are: for
    Kinetics '([\\w-]{11})_\\d{6}_\\d{6}', the YouTube id. Of samples with one identity, the first source
    keeps its own."""
    weight: PositiveFloat | None = None
    """How often the source is read, relative to the other weights; give it for all sources or none. None:
    every sample is read equally often."""

    @model_validator(mode="after")
    def _strata_have_edges(self) -> Self:
        if self.strata > 1 and (self.count is None or self.max_duration_s is None):
            raise ValueError("strata: expected a count to draw, and max_duration_s as the last edge")
        if self.max_duration_s is not None and self.max_duration_s <= self.min_duration_s:
            raise ValueError(
                f"max_duration_s: got {self.max_duration_s:g}, expected more than min_duration_s"
                f" ({self.min_duration_s:g})"
            )
        return self


class MixExclusion(Config):
    """Samples that a mixture must not hold."""

    path: str
    """A data set, whose samples are excluded by content (sha256), or a text file with one key or sha256 per
    line; relative to the recipe."""
    split: str = "all"
    """Split of the data set; `all` excludes every sample."""
    identity: Identity = None
    """As of a source: samples with an identity of these are excluded too, whatever their bytes are, from the
    sources that have an `identity`."""


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class MixRecipe(Config):
    """Which samples of which data sets make a mixture (arXiv:2509.24317, Appendix A)."""

    name: str
    """Name of the mixture."""
    seed: int = 0
    """Decides which samples are drawn."""
    sources: tuple[Annotated[MixSource, BeforeValidator(_path_alone)], ...] = Field(min_length=1)
    """The sources, in order: of samples with the same content, the first source keeps its own. A path without
    more means all of its split `train`."""
    exclude: tuple[Annotated[MixExclusion, BeforeValidator(_path_alone)], ...] = ()
    """Samples to leave out. A path without more excludes all samples of that data set."""

    @model_validator(mode="after")
    def _weights_of_all_or_none(self) -> Self:
        without = [source.path for source in self.sources if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(
                f"sources: got a weight for some and none for {', '.join(without)}, expected a weight for all"
                " of them or for none"
            )
        return self

    @model_validator(mode="after")
    def _identities_meet(self) -> Self:
        sources = [source.path for source in self.sources if source.identity is not None]
        excluded = [exclusion.path for exclusion in self.exclude if exclusion.identity is not None]
        if excluded and not sources:
            raise ValueError(
                f"exclude: got an identity for {', '.join(excluded)} and none for a source, expected one for"
                " the sources too that may have these videos: it is compared with theirs"
            )
        if len(sources) == 1 and not excluded:
            raise ValueError(
                f"sources: got an identity for {sources[0]} alone, expected one for another source or an"
                " entry of exclude too: it is compared with theirs"
            )
        return self


class MixConfig(Config):
    """`salt-data mix`: a selection of several data sets as one, without copying a video."""

    places = ("recipe", "out")

    recipe: str
    """YAML file with name, sources, exclude and seed."""
    out: str
    """Folder for the mixture: an index that points into the tars of its sources."""


class InspectConfig(Config):
    """`salt-data inspect`: what a data set holds, and what a model would see of it."""

    places = ("data", "sheet")

    data: str
    """A packed data set or a mixture."""
    split: str = "all"
    """Split to look at; `all` takes every sample."""
    json_: bool = False
    """One JSON object for programs, instead of tables for people."""
    sheet: PngFile | None = None
    """PNG file for a picture of the first clips that a run with this data seed sees, with the masks of the
    first clip."""
    num_clips: int = Field(default=6, ge=1, le=MASK_GROUP_SIZE)
    """Clips on the sheet."""
    data_seed: int = 0
    """Random seed of the clips on the sheet, as in `salt-train`."""
    seed: int = 0
    """Random seed of the masks on the sheet, as in `salt-train`."""
    encoder: EncoderConfig = EncoderConfig()
    view: ViewConfig = ViewConfig()
    mask: MaskConfig = MaskConfig()
    loader: LoaderConfig = LoaderConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_whole_cubes(self.view, self.encoder)
        return self
