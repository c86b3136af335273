"""How clips are read: by runs, evaluations and caches alike."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from salt_distill.common.config.base import Config
from salt_distill.common.config.marks import OnResume


class LoaderConfig(Config):
    """How a rank reads and decodes."""

    paths = ("shard_cache_dir",)

    decode_processes: Annotated[NonNegativeInt, OnResume("speed")] = 2
    """Processes of each worker that decode the clips of the next steps. 0: the worker itself decodes; a
    broken video can then crash it."""
    decode_timeout_s: Annotated[PositiveFloat, OnResume("when a video counts as bad")] = 60.0
    """Longest that a decoding process may take for one clip, in seconds; then the video is bad, and the
    process is replaced. Without decoding processes there is no limit."""
    prefetch_steps: Annotated[PositiveInt, OnResume("speed and memory")] = 3
    """How many steps ahead clips are decoded and the teacher is asked for their targets."""
    frame_cache_bytes: Annotated[NonNegativeInt, OnResume("speed and memory")] = 0
    """Memory for decoded videos, in bytes; 0: decode a video each time. Only of use for a small data set of
    small videos."""
    shard_cache_dir: Annotated[str | None, OnResume("speed")] = None
    """Folder on a local disk that keeps the videos read from shards, for shards in an object store or on a
    slow disk; runs may share it."""
    shard_cache_bytes: Annotated[PositiveInt, OnResume("speed")] = 100_000_000_000
    """Largest size of `shard_cache_dir`, in bytes; the videos that were not read for the longest time are
    removed first."""
    max_bad_fraction: Annotated[float, OnResume("when the run stops")] = Field(default=0.05, ge=0, le=1)
    """Share of the clips so far that may fail to decode before the command stops; fewer than 100 count as
    100. `salt-serve precompute` counts each shard by itself."""
    shuffle_shards: PositiveInt = 8
    """Shards whose samples are shuffled together. It changes the order of the clips: runs that should see the
    same clips need the same value."""
