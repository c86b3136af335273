"""How clips are read: by runs, evaluations and caches alike."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from salt_distill.common.config.base import Config
from salt_distill.common.config.marks import OnResume


class LoaderConfig(Config):
    """How a rank reads and decodes."""

    paths = ("shard_cache_dir",)

    decode_processes: Annotated[NonNegativeInt, OnResume("speed")] = 2
    """Processes that decode ahead of the step, on this rank; 0 decodes in the rank's own process, which a
    broken video may then take along."""
    decode_timeout_s: Annotated[PositiveFloat, OnResume("when a video counts as bad")] = 60.0
    """Longest that reading and decoding one clip may take, in seconds; then the video is bad, and its process
    is replaced."""
    prefetch_steps: Annotated[PositiveInt, OnResume("speed and memory")] = 3
    """Steps decoded, and asked of the teacher, ahead of the one that trains."""
    frame_cache_bytes: Annotated[NonNegativeInt, OnResume("speed and memory")] = 0
    """Memory for decoded videos, in bytes; 0 decodes a video at every view. Fair only for a small data set of
    small videos."""
    shard_cache_dir: Annotated[str | None, OnResume("speed")] = None
    """Folder on a local disk that keeps the videos read from shards, for shards in an object store or on a
    slow disk; runs may share it."""
    shard_cache_bytes: Annotated[PositiveInt, OnResume("speed")] = 100_000_000_000
    """Size of `shard_cache_dir`, in bytes; the videos that were not read for longest give way."""
    max_bad_fraction: Annotated[float, OnResume("when the run stops")] = Field(default=0.05, ge=0, le=1)
    """Share of clips that may fail to decode before the run stops."""
    shuffle_shards: PositiveInt = 8
    """Shards whose samples are shuffled together. Part of the order: runs that should see the same clips
    share it."""
