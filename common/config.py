"""Every configuration value of the project: its type, its default, its unit."""

from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Views = Literal["fresh"] | PositiveInt
TargetDtype = Literal["float16", "bfloat16", "int8"]


class Config(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class EncoderConfig(Config):
    """A video ViT (arXiv:2509.24317, Table 3). Defaults: ViT-L."""

    width: PositiveInt = 1024
    """Channels of a token."""
    depth: PositiveInt = 24
    """Transformer blocks."""
    num_heads: PositiveInt = 16
    """Attention heads; the width is a multiple of it."""
    mlp_width: PositiveInt = 4096
    """Hidden channels of a block's MLP."""
    patch_size: PositiveInt = 16
    """Side of a patch, in pixels."""
    tubelet_size: PositiveInt = 2
    """Frames of a patch."""
    rope: Literal["vjepa2_tiled", "interleaved"] = "vjepa2_tiled"
    """Pairing of rotary frequencies: V-JEPA 2's own (the paper: identical to V-JEPA 2), or the norm-preserving one."""
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
    if width // num_heads < 6:
        raise ValueError(
            f"{name}: got a head width of {width // num_heads}, expected at least 6, so that each of RoPE's three axes "
            f"has two channels to rotate: lower {name}.num_heads"
        )


class ViewConfig(Config):
    """Which clip a draw takes from a video (Table 5). Everything that decides a clip's bytes beside the draw itself."""

    num_frames: PositiveInt = 16
    """Frames of a clip."""
    frame_step: PositiveInt = 4
    """Frames of the video from one frame of the clip to the next."""
    crop_size: PositiveInt = 224
    """Height and width of a clip, in pixels."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.3, 1.0)
    """Range of the crop's share of the frame's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.35)
    """Range of the crop's width over height, drawn log-uniformly."""
    flip: bool = True
    """Mirror half of the clips left to right. Off where labels name directions."""

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, 3)."""
        return (self.num_frames, self.crop_size, self.crop_size, 3)


class MaskSetConfig(Config):
    """One multi-block mask set: what one forward of the student hides."""

    num_blocks: PositiveInt
    """Blocks hidden per clip; they may overlap."""
    area_fraction: float = Field(gt=0, le=1)
    """Share of one frame's patch grid that a block covers."""


class MaskConfig(Config):
    """V-JEPA's multi-block masks: short range and long range, both for every clip (Table 5)."""

    sets: tuple[MaskSetConfig, ...] = Field(
        default=(MaskSetConfig(num_blocks=8, area_fraction=0.15), MaskSetConfig(num_blocks=2, area_fraction=0.7)), min_length=1
    )
    """The mask sets; each is one forward of encoder and predictor."""
    temporal_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the clip's time steps that a block covers."""
    aspect_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.5)
    """Range of a block's height over width, drawn uniformly."""
    truncate: Literal["first", "random"] = "first"
    """Which tokens stay when a mask group is cut to its smallest member: the first in time order (V-JEPA's way), or a random subset."""


class OptimConfig(Config):
    """AdamW and its schedules (Table 5)."""

    lr: PositiveFloat = 6.25e-4
    """Peak learning rate for the global batch."""
    start_lr: PositiveFloat = 2e-4
    """Learning rate that the warm-up starts from."""
    final_lr: PositiveFloat = 1e-6
    """Learning rate at the last step."""
    warmup_steps: NonNegativeInt = 10_000
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at step 0."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """Weight decay at the last step."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's beta1 and beta2."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    clip_grad: PositiveFloat = 0.02
    """Largest global norm of the gradient, over encoder and predictor together."""


class LoaderConfig(Config):
    """How a rank reads and decodes."""

    decode_threads: PositiveInt = 2
    """Threads that decode ahead of the step."""
    prefetch_steps: PositiveInt = 3
    """Steps decoded, and asked of the teacher, ahead of the one that trains."""
    frame_cache_bytes: NonNegativeInt = 0
    """Memory for decoded videos, in bytes; 0 decodes a video at every view. Fair only for a small data set of small videos."""
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of clips that may fail to decode before the run stops."""
    shuffle_shards: PositiveInt = 8
    """Shards whose samples are shuffled together. Part of the order: runs that should see the same clips share it."""


class TeacherComputeConfig(Config):
    """How a frozen teacher runs: together with the weights this decides a target to the bit."""

    batch_size: PositiveInt = 16
    """Clips of one teacher forward; smaller batches are padded to it."""
    num_threads: PositiveInt = 1
    """CPU threads of a teacher forward."""


class ServiceClientConfig(Config):
    """How a student asks the teacher service."""

    request_clips: PositiveInt = 16
    """Clips of one request."""
    connections: PositiveInt = 4
    """Requests in flight at a time."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for one response, in seconds."""
    retry_budget_s: PositiveFloat = 120.0
    """How long one request is retried, with backoff, before the run stops, in seconds."""


class TrainConfig(Config):
    """What every training run has. The top level holds the flags of ``salt-train``; the rest is reached by ``--set``."""

    data: str
    """Folder of WebDataset shards with an index, as `salt-data pack` writes it."""
    out: str
    """Run directory: config, metrics, TensorBoard events, checkpoints."""
    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt = 3072
    """Clips per step, all workers together."""
    seed: int = 0
    """Decides initialisation and masks."""
    data_seed: int = 0
    """Decides the order of the samples and their views; runs that share it see the same clips."""
    views: Views = "fresh"
    """Views per sample: `fresh` draws a new one in every pass (the paper), a number K repeats K pinned ones."""
    split: str = "train"
    """Split of the data set to train on; `all` takes every sample."""
    workers: NonNegativeInt = 1
    """Ray Train workers; 0 runs in this process, without Ray."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a worker; may be a fraction."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that Ray sets aside for a worker; with 0 it trains on the CPU. `--workers 0` takes a GPU if there is one."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the command."""
    num_threads: PositiveInt = 1
    """CPU threads of a worker's forward and backward."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights (V-JEPA 2's 0.02). Narrow models start faster from more: 0.02 * sqrt(1024 / width)."""
    log_every: PositiveInt = 10
    """Steps from one line of metrics.jsonl to the next."""
    keep_every: PositiveInt = 1000
    """Steps from one checkpoint to the next; the last step always has one."""
    resume: bool = False
    """Continue the run in `out` after its newest checkpoint."""
    encoder: EncoderConfig = EncoderConfig()
    predictor: PredictorConfig = PredictorConfig()
    view: ViewConfig = ViewConfig()
    mask: MaskConfig = MaskConfig()
    optim: OptimConfig = OptimConfig()
    loader: LoaderConfig = LoaderConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.view.num_frames % self.encoder.tubelet_size or self.view.crop_size % self.encoder.patch_size:
            raise ValueError(
                f"got a clip of {self.view.num_frames} frames of {self.view.crop_size} pixels, expected multiples of "
                f"encoder.tubelet_size={self.encoder.tubelet_size} and encoder.patch_size={self.encoder.patch_size}"
            )
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(
                f"got steps={self.steps} with optim.warmup_steps={self.optim.warmup_steps}, expected a warm-up shorter than the run: "
                f"raise --steps, or --set optim.warmup_steps={self.steps // 10}"
            )
        num_groups = -(-self.batch_size // MASK_GROUP_SIZE)
        if self.workers > num_groups:
            raise ValueError(
                f"got workers={self.workers} for batch_size={self.batch_size}, expected at most {num_groups}: a worker takes whole mask "
                f"groups of {MASK_GROUP_SIZE} clips"
            )
        return self


MASK_GROUP_SIZE = 24
"""Clips that share a block size and kept counts: the paper's per-GPU batch, 3072 / 128 (DESIGN section 4, Masks)."""


class TeacherRun(TrainConfig):
    """Stage 1, V-Pixel: masked pixel reconstruction."""

    pixel_norm: Literal["channel", "joint"] = "channel"
    """Pixels of a cube are normalised per channel (VideoMAE, the paper), or over all channels together (MAE)."""


class StudentRun(TrainConfig):
    """Stage 2, SALT: predict a frozen teacher's latents. Exactly one of the three sources of targets."""

    teacher_url: str | None = None
    """A teacher service, as `salt-serve teacher` prints it."""
    targets: str | None = None
    """A target cache, as `salt-serve precompute` writes it."""
    teacher_ckpt: str | None = None
    """A checkpoint: the teacher runs in the student's own process."""
    target_dtype: TargetDtype = "float16"
    """Rounding of the targets; the same in every source."""
    teacher: TeacherComputeConfig = TeacherComputeConfig()
    client: ServiceClientConfig = ServiceClientConfig()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("teacher_url", "targets", "teacher_ckpt") if getattr(self, name) is not None]
        if len(given) != 1:
            flags = ", ".join("--" + name.replace("_", "-") for name in given) or "none"
            raise ValueError(f"got {flags}, expected exactly one source of targets: --teacher-url, --targets or --teacher-ckpt")
        return self


# --- presets: arXiv:2509.24317, Tables 3 and 4; nano is ours, for CPUs ---

_PAPER_STEPS = {"TeacherRun": 80_000, "StudentRun": 160_000}


def _vit(width: int, depth: int, num_heads: int, mlp_width: int) -> dict[str, Any]:
    return {"encoder": {"width": width, "depth": depth, "num_heads": num_heads, "mlp_width": mlp_width}}


PRESETS: dict[str, dict[str, Any]] = {
    "vit-b": _vit(768, 12, 12, 3072),
    "vit-l": _vit(1024, 24, 16, 4096),
    "vit-h": _vit(1280, 32, 16, 5120),
    "vit-g": _vit(1408, 40, 16, 6144),
    "vit-G": _vit(1664, 48, 16, 8192),
    "nano": {
        "encoder": {"width": 96, "depth": 4, "num_heads": 3, "mlp_width": 384, "patch_size": 8},
        "predictor": {"width": 48, "depth": 2, "num_heads": 2, "mlp_width": 192},
        "init_std": 0.07,
        "view": {"num_frames": 8, "frame_step": 2, "crop_size": 32, "scale": (0.6, 1.0)},
        "optim": {"lr": 2e-3, "start_lr": 2e-4, "warmup_steps": 30, "clip_grad": 1.0, "final_weight_decay": 0.04},
        "loader": {"frame_cache_bytes": 1_000_000_000},
        "batch_size": 48,
        "steps": 600,
    },
}


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries in one; later layers win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def preset_layer(config_class: type[Config], preset: str) -> dict[str, Any]:
    """The values that a preset sets for a kind of run."""
    if preset not in PRESETS:
        raise ValueError(f"got preset {preset!r}, expected one of {', '.join(PRESETS)}")
    steps = {"steps": _PAPER_STEPS[config_class.__name__]} if config_class.__name__ in _PAPER_STEPS else {}
    return merge(steps, PRESETS[preset])


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    loaded = yaml.safe_load(Path(path).read_text())
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: got {type(loaded).__name__}, expected a mapping of configuration keys")
    return loaded


def dump_yaml(config: Config) -> str:
    """The resolved configuration; ``load_yaml`` and validation give it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def explain(error: pydantic.ValidationError) -> str:
    """One line per wrong value: its path, what was got, what was expected."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if part != "function-after")
        got = "" if item["type"] in ("missing", "value_error") else f", got {item['input']!r}"
        lines.append(f"{path + ': ' if path else ''}{item['msg'].removeprefix('Value error, ')}{got}")
    return "\n".join(lines)


# --- salt-eval ---


class ProbeConfig(Config):
    """The attentive probe on frozen encoders: one clip, one view, one setting chosen beforehand (Table 7, the fast protocol)."""

    ckpt: tuple[str, ...] = Field(min_length=1)
    """Run directory or checkpoint to judge."""
    data: str
    """Packed data set with labels: the probe learns on its split `train` and is scored on `test`."""
    out: str
    """JSON file of the accuracies."""
    random_init: bool = False
    """Also judge the first checkpoint's architecture with fresh weights."""
    epochs: PositiveInt = 20
    """Passes over the training clips. A data set of a few thousand clips wants more, or a smaller batch: 20 passes are then few steps."""
    lr: PositiveFloat = 1e-3
    """Learning rate at the first step; a cosine takes it to 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay, on every parameter of the probe."""
    batch_size: PositiveInt = 256
    """Clips of one step of the probe."""
    num_heads: PositiveInt | None = None
    """Attention heads of the probe; none: as many as the encoder has."""
    seed: int = 0
    """Decides the probe's initial weights, the order of its clips and the weights of `--random-init`."""
    encode_batch_size: PositiveInt = 16
    """Clips of one forward of a frozen encoder."""
    max_feature_bytes: PositiveInt = 16_000_000_000
    """Most memory that the clips and tokens of one encoder may take, in bytes."""
    num_threads: PositiveInt = 1
    """CPU threads of encoder and probe."""
    loader: LoaderConfig = LoaderConfig()


class ReportConfig(Config):
    """One page about a set of runs."""

    run_dirs: tuple[str, ...] = ()
    """Run directories."""
    runs: str | None = None
    """Folder of run directories; its probe.json, server.json and steps.tsv are read where they exist."""
    out: str | None = None
    """The page; summary.json is written beside it. None: report.html in the folder of `--runs`."""

    @model_validator(mode="after")
    def _has_runs(self) -> Self:
        if not self.run_dirs and self.runs is None:
            raise ValueError("got no runs, expected run directories, or --runs FOLDER")
        if self.out is None and self.runs is None:
            raise ValueError("got no --out, expected a path for the page: only with --runs is there a folder for it")
        return self


# --- salt-data ---


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


# --- salt-serve ---


class ServiceConfig(Config):
    """What one replica of the teacher service holds and how long it waits."""

    batch_wait_ms: PositiveFloat = 5.0
    """How long the first clip of a batch waits for others, in milliseconds; a full batch does not wait."""
    memory_bytes: NonNegativeInt = 2_000_000_000
    """Memory for encoded targets, in bytes: what runs that follow each other share."""
    max_request_bytes: PositiveInt = 256_000_000
    """Largest request body, in bytes."""
    max_pending_bytes: PositiveInt = 1_000_000_000
    """Clips on their way to the teacher, in bytes; beyond it a request is answered 429."""
    retry_after_s: PositiveFloat = 0.5
    """What a client that was answered 429 or 503 is told to wait, in seconds."""
    lease_s: PositiveFloat = 10.0
    """How long the first asker of a clip may take to upload it before the next one is asked, in seconds."""
    max_runs: PositiveInt = 1000
    """Student runs on the board; the one that was silent longest is forgotten."""


class ServeConfig(Config):
    """`salt-serve teacher`: a frozen teacher behind Ray Serve."""

    ckpt: str
    """Run directory or checkpoint of the teacher."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the command."""
    cpus: PositiveFloat = 1.0
    """CPUs that Ray sets aside for the teacher; may be a fraction."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray sets aside for the teacher; with 0 it runs on the CPU."""
    board_file: str | None = None
    """File that the student runs' progress is appended to, a JSON line each."""
    teacher: TeacherComputeConfig = TeacherComputeConfig()
    service: ServiceConfig = ServiceConfig()


class PrecomputeConfig(Config):
    """`salt-serve precompute`: a frozen teacher's targets on disk, of clips drawn with the view configuration it was trained with."""

    ckpt: str
    """Run directory or checkpoint of the teacher."""
    data: str
    """Folder of WebDataset shards with an index, as `salt-data pack` writes it."""
    out: str
    """The cache: arrow files and, last, manifest.json. A command that was killed continues when it is repeated."""
    views: PositiveInt
    """Pinned views per sample: the K of the student's `--views`."""
    data_seed: int = 0
    """Decides the views; the students' own."""
    split: str = "train"
    """Split of the data set; `all` takes every sample."""
    target_dtype: TargetDtype = "float16"
    """Rounding of the targets; the students' own."""
    workers: NonNegativeInt = 1
    """Ray actors; 0 runs in this process, without Ray."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a worker; may be a fraction."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that Ray sets aside for a worker. With 0 it runs on the CPU; `--workers 0` takes a GPU if there is one."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the command."""
    teacher: TeacherComputeConfig = TeacherComputeConfig()
    loader: LoaderConfig = LoaderConfig()


class StatusConfig(Config):
    """`salt-serve status`: what a running teacher service says of itself."""

    url: str
    """The service, as `salt-serve teacher` prints it."""
    wait: float = Field(default=0.0, ge=0)
    """How long to wait until the service is ready, in seconds."""
    format: Literal["text", "json"] = "text"
    """Text for people, or JSON."""
