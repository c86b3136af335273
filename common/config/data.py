"""Making and packing videos: ``salt-data``."""

from pydantic import Field, PositiveFloat, PositiveInt

from common.config.base import Config


class SynthConfig(Config):
    """`salt-data synth`: labelled videos made here, small enough to learn from on a CPU."""

    out: str
    """Folder for the videos and their labels.csv."""
    num_train: PositiveInt = 1200
    """Videos of the training split."""
    num_test: PositiveInt = 400
    """Videos of the test split; their digits were written by other people's hands."""
    seed: int = 0
    """Decides every video."""
    size: int = Field(default=40, ge=36, multiple_of=2)
    """Height and width of a video, in pixels."""
    num_frames: int = Field(default=16, ge=8)
    """Frames of a video."""
    fps: PositiveFloat = 12.0
    """Frames per second."""


class PackConfig(Config):
    """`salt-data pack`: videos to WebDataset shards with an index."""

    src: str
    """Folder of videos (taken with its subfolders), or a CSV file with a column `path` and one column per label; a folder may hold a labels.csv."""
    out: str
    """Folder for the shards; a second run on the same input gives the same bytes."""
    name: str | None = None
    """Name of the source in keys and file names; else the folder's name."""
    max_shard_bytes: PositiveInt = 1_000_000_000
    """Size at which a shard is full, in bytes."""
    short_side: PositiveInt | None = None
    """Re-encode every video so that its shorter side has this many pixels; else the original bytes are kept."""
    max_bad_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of videos that may be unreadable before the command stops."""
    workers: PositiveInt | None = None
    """Processes that read videos; else one per CPU."""
