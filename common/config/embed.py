"""Features of videos, and what kept probes say of them: ``salt-eval embed``, ``similar``, ``predict``."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from salt_distill.common.config.base import Config
from salt_distill.common.config.device import Device, GpusPerWorker, require_one_device
from salt_distill.common.config.model import CropSize
from salt_distill.common.config.train import ComputeDtype
from salt_distill.common.config.wrong_values import PngFile


class VideosConfig(Config):
    """How videos are decoded that nobody has packed."""

    decode_processes: NonNegativeInt = 2
    """Processes that decode; 0 decodes in the command's own process, which a broken video may then take
    along."""
    decode_timeout_s: PositiveFloat = 600.0
    """Longest that a decoding process may take to open a video, or for one batch of its clips, in seconds; a
    video that takes longer is left out. Without decoding processes there is no limit."""
    max_bad_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of videos that may be unreadable; of more than that the command makes no file."""


class EmbedConfig(Config):
    """`salt-eval embed`: features of videos, which need no packing and no labels."""

    paths = ("ckpt", "videos", "out")

    videos: str
    """A video, a folder of videos (with its subfolders), or a packed data set."""
    ckpt: str
    """Frozen encoder: whatever `salt-serve teacher --ckpt` takes."""
    out: str
    """The features: `.parquet`, or `.arrow` (Arrow IPC), float16. The command continues what it left."""
    tokens: Literal["clip", "step", "all"] = "clip"
    """What a row holds: the mean of a clip's tokens, the mean of each time step's, or all tokens."""
    window: PositiveFloat | None = None
    """Seconds of a video that a clip's frames are spread over; rows follow each other through the video.
    None: one clip in the middle of each video, `frame_step` frames apart."""
    stride: PositiveFloat | None = None
    """Seconds from the start of one window to the next; none: those of a window."""
    num_frames: PositiveInt | None = None
    """Frames of a clip; none: what the checkpoint says, 16 where it says nothing."""
    crop_size: CropSize | None = None
    """Height and width of a clip, in pixels; none: what the checkpoint says, 224 where it says nothing."""
    frame_step: PositiveInt | None = None
    """Frames of the video from one frame of a clip to the next; none: what the checkpoint says, 4 where it
    says nothing. Without `window` only."""
    batch_size: PositiveInt = 16
    """Clips of one forward."""
    dtype: ComputeDtype = "auto"
    """Precision of matrix products, as in `compute.dtype`. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    workers: NonNegativeInt = 0
    """Ray Train workers, which share the videos; 0 runs in this process, without Ray."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a worker; may be a fraction."""
    gpus_per_worker: GpusPerWorker = None
    """GPUs that Ray sets aside for a worker; may be a fraction. None: one where Ray has any; 0 runs on the
    CPU."""
    device: Device = "auto"
    """`auto`: GPUs where there are any, else the CPU. `cpu`: the CPU."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the
    command."""
    num_threads: PositiveInt = 1
    """CPU threads of the encoder, on each worker."""
    loader: VideosConfig = VideosConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_one_device(self.device, self.gpus_per_worker)
        if self.stride is not None and self.window is None:
            raise ValueError("got --stride without --window, expected both: without it a video has one clip")
        if self.frame_step is not None and self.window is not None:
            raise ValueError(
                "got --frame-step with --window, expected one: a window's frames are spread over it"
            )
        if not self.out.endswith((".parquet", ".arrow")):
            raise ValueError(f"got --out {self.out}, expected a name that ends in .parquet or .arrow")
        return self

    @property
    def extras(self) -> tuple[str, ...]:
        return ("train",) if self.workers else ()

    @property
    def fewest_workers(self) -> int:
        """As many as are asked for."""
        return self.workers

    @property
    def most_workers(self) -> int:
        """As many as are asked for."""
        return self.workers


class SimilarConfig(Config):
    """`salt-eval similar`: the clips nearest to one of them, by the cosine of their features."""

    features: str
    """File of `salt-eval embed`, with a row for each clip (`--tokens clip`)."""
    query: str
    """Path of a video, as in the file; one window of it as PATH@SECONDS."""
    out: str
    """CSV file of the nearest clips."""
    num: PositiveInt = 8
    """Clips to find."""
    sheet: PngFile | None = None
    """PNG with the middle frame of each."""
    videos: str | None = None
    """What was embedded, for the pictures of `sheet`."""


class PredictConfig(Config):
    """`salt-eval predict`: what kept probes say of videos."""

    probe: str
    """`probe.safetensors` of `salt-eval probe`."""
    videos: str
    """A video, a folder of videos (with its subfolders), or a packed data set."""
    out: str
    """CSV file: for each video and label the class and its probability, of each view and of all."""
    encoder: str | None = None
    """Whose probes; none: the only one's."""
    ckpt: str | None = None
    """Where the encoder is now; none: where it was when it was probed."""
    batch_size: PositiveInt = 16
    """Clips of one forward."""
    dtype: ComputeDtype = "auto"
    """Precision of matrix products, as in `compute.dtype`. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    num_threads: PositiveInt = 1
    """CPU threads of the models."""
    loader: VideosConfig = VideosConfig()
