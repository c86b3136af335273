"""Training runs: ``salt-train``."""

from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from salt_distill.common.config.base import Config
from salt_distill.common.config.device import Device, GpusPerWorker, require_one_device
from salt_distill.common.config.learning import EmaConfig, OptimConfig
from salt_distill.common.config.loader import LoaderConfig
from salt_distill.common.config.marks import DecidedBySweep, OnResume, Shown, marked
from salt_distill.common.config.model import (
    MASK_GROUP_SIZE,
    EncoderConfig,
    GpuName,
    MaskConfig,
    PredictorConfig,
    ViewConfig,
    Views,
    require_whole_cubes,
)
from salt_distill.common.config.wrong_values import shown

ComputeDtype = Literal["auto", "float32", "bfloat16"]

Sharding = Literal["ddp", "fsdp"]
"""How the ranks of a run share a model."""


class ComputeConfig(Config):
    """How encoder and predictor compute. Beside the precision it decides speed and memory alone: losses and
    gradients agree to rounding."""

    dtype: ComputeDtype = "auto"
    """Precision of matrix products and of what blocks hand on (weights, the encoder's last norm, targets and
    loss stay float32; norms compute in float32 and give bfloat16). `auto`: bfloat16 on a GPU, float32 on a
    CPU."""
    activation_checkpointing: Annotated[bool, OnResume("speed and memory; losses agree to rounding")] = False
    """Compute each block again in the backward instead of keeping what is inside it: a third more compute for
    a fraction of the memory."""
    compile: Annotated[Literal["auto"] | bool, OnResume("speed; losses agree to rounding")] = "auto"
    """Compile each block (torch.compile): faster steps after a slow first one. Needs a C++ compiler, on a GPU
    a C compiler too. `auto`: on a GPU beside which they are."""
    sharding: Annotated[Sharding, OnResume("speed and memory; losses agree to rounding")] = "ddp"
    """With several workers: `ddp` holds the whole model on each; `fsdp` holds a slice of each parameter and
    of its optimizer state, for models that leave a GPU no room for clips, and gathers a block's parameters
    while it computes."""
    attention: Annotated[
        Literal["sdpa", "explicit"], OnResume("speed and memory; losses agree to rounding")
    ] = "sdpa"
    """PyTorch's fused attention, or softmax(q k^T) v written out, to compare it with."""


class TeacherComputeConfig(Config):
    """How a frozen teacher runs: together with the weights this decides a target to the bit."""

    batch_size: PositiveInt = 16
    """Clips of one teacher forward; smaller batches are padded to it."""
    num_threads: PositiveInt = 1
    """CPU threads of a teacher forward."""
    dtype: ComputeDtype = "auto"
    """Precision of its matrix products, as in `compute.dtype`; its last norm and targets stay float32.
    `auto`: bfloat16 on a GPU, float32 on a CPU."""
    compile: Literal["auto"] | bool = "auto"
    """Compile its blocks (torch.compile): faster forwards after a slow first one, and other bits. As
    `compute.compile`."""


class TrainConfig(Config):
    """What every training run has. The top level holds the flags of ``salt-train``; the rest is reached by
    ``--set``."""

    paths = ("data", "out", "storage", "init")
    objective: ClassVar[str]
    """What checkpoints and summaries call it."""

    data: Annotated[str, OnResume("may be elsewhere: its index hash is compared with the checkpoint's")]
    """Folder of WebDataset shards with an index, as `salt-data pack` writes it, or its address in an object
    store, such as s3://BUCKET/SHARDS."""
    out: Annotated[str, OnResume("the run directory may have moved"), DecidedBySweep()]
    """Run directory: config, metrics, TensorBoard events, checkpoints."""
    steps: Annotated[
        PositiveInt,
        Shown(),
        OnResume(
            "more, but not fewer than are done; where learning rate, weight decay or the EMA's momentum jump,"
            " both values are said"
        ),
    ]
    """Optimizer steps."""
    batch_size: Annotated[PositiveInt, Shown()] = 3072
    """Clips per step, all workers together."""
    seed: Annotated[int, Shown()] = 0
    """Random seed of the initial weights and of the masks."""
    data_seed: Annotated[int, Shown()] = 0
    """Random seed of the order of the samples and of their views. Runs with the same one see the same
    clips."""
    views: Annotated[Views, Shown()] = "fresh"
    """Views per sample; a view is one way to cut a clip from a video. `fresh`: a new one in every epoch (the
    paper), or with `--targets` those of the cache. A number K: the same K views again and again (pinned
    views)."""
    split: Annotated[str, Shown()] = "train"
    """Split of the data set to train on; `all` takes every sample."""
    workers: Annotated[int | str, Shown(), OnResume("losses agree to rounding")] = 1
    """Number of Ray Train workers. FEWEST:MOST, such as 2:8: always as many as the cluster has room for.
    0: train in this process, without Ray."""
    cpus_per_worker: Annotated[PositiveFloat, OnResume("speed")] = 1.0
    """CPUs that Ray sets aside for a worker; may be a fraction."""
    gpus_per_worker: Annotated[GpusPerWorker, OnResume("losses agree to rounding")] = None
    """GPUs that Ray sets aside for a worker; may be a fraction. None: one where Ray has any; 0 trains on the
    CPU."""
    device: Annotated[Device, OnResume("losses agree to rounding")] = "auto"
    """`auto`: GPUs where there are any, else the CPU; encoders as large as the paper's are then refused.
    `cpu`: the CPU, whatever the size."""
    max_failures: Annotated[int, OnResume("when the command ends")] = Field(default=0, ge=-1)
    """How often lost workers are replaced and the run continues from its newest checkpoint; -1: without
    limit. A node that a cloud takes back does not count. With 0 the run stops, and `--resume` continues
    it."""
    address: Annotated[str | None, OnResume("where it trains"), DecidedBySweep()] = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the
    command."""
    num_threads: PositiveInt = 1
    """CPU threads of a worker's forward and backward."""
    init: str | None = None
    """Checkpoint whose encoder the run starts from: ours or V-JEPA 2's. The sizes of the encoder must be the
    run's; clips may have another size. From a checkpoint of ours the predictor is taken too, if it predicts
    the same (pixels or latents) and its shapes fit. None: random weights."""
    init_std: Annotated[PositiveFloat, Shown()] = 0.02
    """Standard deviation of the initial weights (V-JEPA 2: 0.02). Narrow models learn faster at first with a
    larger one: 0.02 * sqrt(1024 / width)."""
    log_every: Annotated[PositiveInt, OnResume("how many lines metrics.jsonl has")] = 10
    """Steps from one line of metrics.jsonl to the next."""
    metrics_port: Annotated[int | None, OnResume("who sees the metrics")] = Field(
        default=None, ge=1, le=65535
    )
    """Port at which the first worker gives its newest metrics to Prometheus, on every address of its machine.
    None: no port."""
    wandb: Annotated[str | None, OnResume("who sees the metrics")] = Field(default=None, min_length=1)
    """Project of Weights & Biases that the metrics are sent to; needs the package wandb. None: nothing is
    sent."""
    pictures_every: Annotated[PositiveInt | None, OnResume("which steps have pictures")] = 1000
    """Steps from one picture in TensorBoard (and `--wandb`) to the next: a training clip with its masks, in
    stage 1 with what the model paints there. None: no pictures."""
    keep_every: Annotated[PositiveInt, OnResume("which steps have a checkpoint")] = 1000
    """Steps from one checkpoint to the next. The last step, and the one with the lowest held-out loss, always
    have one."""
    keep_minutes: Annotated[PositiveFloat | None, OnResume("which steps have a checkpoint")] = None
    """Minutes from one checkpoint to the next at most, to the end of the step that is under way then; None:
    `--keep-every` alone decides. A run that is killed is trained again from its newest checkpoint."""
    keep_last: Annotated[PositiveInt | None, OnResume("which steps have a checkpoint")] = None
    """How many of the newest checkpoints are kept in `out`, beside `checkpoints/best`; an older one is
    removed when a newer one is complete. None: all are kept. `storage` keeps all that were copied
    there."""
    val_every: Annotated[
        PositiveInt | None,
        OnResume("which steps have a held-out loss; not off or on where training clips are held out"),
    ] = None
    """Steps from one measurement of the held-out loss to the next: the loss on clips that the run does not
    learn from. The last step has one too. `checkpoints/best` is the checkpoint with the lowest. The clips are
    from the split `val`; without such a split they are taken out of the training split. None: no clips are
    held out."""
    val_clips: PositiveInt = 240
    """Number of held-out clips for `--val-every`, or all of the split `val` where it has fewer: the same
    clips with the same masks each time. They are kept in memory, with their targets."""
    val_features: Annotated[bool, OnResume("what else is measured")] = False
    """With `--val-every`: also measure the encoder's features of the held-out clips by RankMe and, if they
    have labels, by k-nearest-neighbour accuracy (each half of the clips is classified by the other). Needs
    at least as many `--val-clips` as the encoder has channels."""
    stop_after_no_gain: Annotated[PositiveInt | None, OnResume("when the run ends")] = None
    """End the run when this many measurements of `--val-every` in a row were not lower than the lowest
    before. None: the run ends at `--steps`."""
    storage: Annotated[str | None, OnResume("where copies go")] = None
    """Address such as s3://BUCKET/RUN, or folder, that checkpoints and metrics are copied to during the
    training. `--resume` continues from there if `out` is empty or older, on any machine."""
    resume: Annotated[bool, OnResume("continues the run"), DecidedBySweep()] = False
    """Continue the run in `out`, or in `storage`, after its newest checkpoint."""
    estimate: Annotated[bool, OnResume("no run"), DecidedBySweep()] = False
    """Do not train: time 20 steps on random clips, and say what the whole run would take in time, FLOPs and
    memory. Reads no data and writes no run."""
    estimate_out: Annotated[str | None, OnResume("no run"), DecidedBySweep()] = None
    """JSON file for what `--estimate` finds."""
    gpu: Annotated[GpuName | None, OnResume("no run"), DecidedBySweep()] = None
    """With `--estimate`: say whether the run fits GPUs of this kind, which need not be here, and how long a
    step takes at least. This is counted, not timed."""
    dry_run: Annotated[bool, OnResume("no run"), DecidedBySweep()] = False
    """Do not train: open all that the run needs (data, teacher or targets, devices, workers), make its first
    steps on the real clips, and say what was found. Writes nothing."""
    encoder: Annotated[EncoderConfig, Shown()] = EncoderConfig()
    predictor: Annotated[PredictorConfig, Shown()] = PredictorConfig()
    view: Annotated[ViewConfig, Shown()] = ViewConfig()
    mask: Annotated[MaskConfig, Shown()] = MaskConfig()
    optim: Annotated[OptimConfig, Shown()] = OptimConfig()
    compute: Annotated[ComputeConfig, Shown()] = ComputeConfig()
    loader: LoaderConfig = LoaderConfig()

    @property
    def extras(self) -> tuple[str, ...]:
        needs_train = (self.most_workers or self.metrics_port is not None) and not self.estimate
        for_train = ("train",) if needs_train else ()
        return for_train if self.wandb is None else (*for_train, "wandb")

    @property
    def loss_shares(self) -> tuple[float, ...]:
        """Of each teacher's loss in the run's, together 1; of a run without teachers that of its one loss."""
        return (1.0,)

    @property
    def fewest_workers(self) -> int:
        """Workers that the run needs at least."""
        return int(str(self.workers).partition(":")[0])

    @property
    def most_workers(self) -> int:
        """Workers that the run takes at most."""
        return int(str(self.workers).rpartition(":")[2])

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: object) -> int | str:
        fewest, separator, most = str(value).partition(":")
        if not fewest.isdecimal() or (separator and not (most.isdecimal() and 1 <= int(fewest) <= int(most))):
            raise ValueError(
                f"got {shown(value)}, expected a number of workers, or the fewest and the most of them, such"
                " as 2:8"
            )
        return f"{int(fewest)}:{int(most)}" if separator else int(fewest)

    @model_validator(mode="before")
    @classmethod
    def _estimates_need_no_data(cls, values: Any) -> Any:
        """With ``--estimate`` neither ``data`` nor ``out`` has to be given: nothing is read or written."""
        estimates = isinstance(values, dict) and values.get("estimate")
        return {"data": "", "out": ""} | values if estimates else values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_whole_cubes(self.view, self.encoder)
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(
                f"got steps={self.steps} with optim.warmup_steps={self.optim.warmup_steps}, expected a"
                " warm-up shorter than the run: raise --steps, or --set"
                f" optim.warmup_steps={self.steps // 10}"
            )
        require_one_device(self.device, self.gpus_per_worker)
        num_groups = -(-self.batch_size // MASK_GROUP_SIZE)
        if self.most_workers > num_groups:
            raise ValueError(
                f"got workers={self.workers} for batch_size={self.batch_size}, expected at most {num_groups}:"
                f" a worker takes whole mask groups of {MASK_GROUP_SIZE} clips"
            )
        for name in ("val_clips", "val_features", "stop_after_no_gain"):
            if self.val_every is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"got --{name.replace('_', '-')} without --val-every, expected both: it is about the"
                    " held-out loss"
                )
        if self.val_features and self.val_clips < self.encoder.width:
            raise ValueError(
                f"got --val-features with --val-clips {self.val_clips}, expected {self.encoder.width} or"
                " more: RankMe needs as many clips as the encoder has channels"
            )
        if self.val_every is not None and self.val_every % self.log_every:
            raise ValueError(
                f"got --val-every {self.val_every} with --log-every {self.log_every}, expected a multiple of"
                " it: a held-out loss is part of a line of metrics.jsonl"
            )
        if self.estimate_out is not None and not self.estimate:
            raise ValueError(
                f"got --estimate-out {self.estimate_out} without --estimate, expected both: only an estimate"
                " is written there"
            )
        if self.gpu is not None and not self.estimate:
            raise ValueError(f"got --gpu {self.gpu} without --estimate, expected both")
        instead = [name for name in ("estimate", "dry_run") if getattr(self, name)]
        if len(instead) + self.resume > 1:
            flags = ["--" + name.replace("_", "-") for name in (*instead, *["resume"] * self.resume)]
            raise ValueError(
                f"got {' with '.join(flags)}, expected one of them: an estimate, and a dry run, is of a whole"
                " run"
            )
        return self


class TeacherRun(TrainConfig):
    """Stage 1, V-Pixel: masked pixel reconstruction."""

    objective = "vpixel"

    pixel_norm: Annotated[Literal["channel", "joint"], Shown()] = "channel"
    """Pixels of a cube are normalised per channel (VideoMAE, the paper), or over all channels together
    (MAE)."""


class VJepaRun(TrainConfig):
    """The baseline, V-JEPA 2: predict the latents of a moving average of the encoder itself. All else as in
    SALT, so that one thing differs."""

    objective = "vjepa"

    ema: Annotated[EmaConfig, Shown()] = EmaConfig()


def shown_config(config: TrainConfig) -> dict[str, JsonValue]:
    """What a board, or a tracker, shows of a run's configuration; of its data the folder's name."""
    shown = {key for key, _ in marked(type(config), Shown)}
    return {"data": PurePosixPath(config.data).name, **config.model_dump(mode="json", include=shown)}
