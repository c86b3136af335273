"""Judging encoders and reporting on runs: ``salt-eval``."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from salt_distill.common.config.base import Config
from salt_distill.common.config.device import Device, GpusPerWorker, require_one_device
from salt_distill.common.config.loader import LoaderConfig
from salt_distill.common.config.model import (
    CropSize,
    EncoderConfig,
    MaskConfig,
    PredictorConfig,
    ViewConfig,
    require_whole_cubes,
)
from salt_distill.common.config.presets import PRESETS
from salt_distill.common.config.train import ComputeDtype

COMMAND_ONLY = "command only"
"""Marks a field of `ProbeConfig` that does not change a probe."""


class ProbeConfig(Config):
    """The attentive probe on frozen encoders. Without a preset: the cross-attention block alone, one clip,
    one view, one setting (Table 7)."""

    paths = ("ckpt", "data", "out", "features")

    ckpt: Annotated[tuple[str, ...], COMMAND_ONLY] = Field(min_length=1)
    """Frozen encoder to judge: whatever `salt-serve teacher --ckpt` takes."""
    data: str
    """Packed data set with labels: the probe is trained on its split `train`, the best setting is selected on
    `val`, and its accuracy is measured on `test`."""
    out: Annotated[str, COMMAND_ONLY]
    """JSON file of the accuracies; tables and pictures of the classes are written beside it."""
    num_frames: PositiveInt | None = None
    """Frames of a clip; none: what each checkpoint says, 16 where it says nothing."""
    crop_size: CropSize | None = None
    """Height and width of a clip, in pixels; none: what each checkpoint says, 224 where it says nothing."""
    frame_step: PositiveInt | None = None
    """Frames of the video from one frame of a clip to the next; none: what each checkpoint says, 4 where it
    says nothing."""
    segments: PositiveInt = 1
    """Equal parts of a video. A clip is taken from each, and the probe reads the tokens of all clips
    together."""
    views: PositiveInt = 1
    """Number of crops that are scored, from one end of the frame's longer side to the other; their class
    probabilities are averaged. The probe is trained on the middle one."""
    square: float = Field(default=1.0, gt=0, le=1)
    """Height and width of a crop, as a share of the largest crop that fits into the frame (V-JEPA 2: 0.875
    with one view, 1 with three)."""
    augment: bool = False
    """Train on other clips in every epoch: they start anywhere in their segments, and are cropped to 8 to
    100% of the frame. The encoder then computes all clips again in every epoch; without it, each clip is
    computed once."""
    augment_with: Literal["crops", "video", "images"] = "crops"
    """What `augment` does. `crops`: only crops. `video`: also RandAugment and erased rectangles, as V-JEPA 2
    does with videos. `images`: also mirroring, AutoAugment and erased rectangles, as it does with images;
    images are then resized with antialias, also when they are scored and without `augment`."""
    random_init: Annotated[bool, COMMAND_ONLY] = False
    """Also probe an encoder like the first checkpoint's with random weights."""
    depth: PositiveInt = 1
    """Blocks of the probe: the last is the cross-attention of one learned query, those before it are
    self-attention over all tokens (V-JEPA 2: 4)."""
    num_heads: PositiveInt | None = None
    """Attention heads of the probe; none: as many as the encoder has."""
    epochs: PositiveInt = 20
    """Passes over the training clips. For a data set of a few thousand clips give more, or a smaller batch,
    since 20 passes are then only few steps."""
    lr: tuple[PositiveFloat, ...] = Field(default=(1e-3,), min_length=1)
    """Learning rate at the first step; a cosine lowers it to 0 at the last step. Several may be given: a
    probe is trained for each pair of a learning rate and a `weight_decay`."""
    weight_decay: tuple[NonNegativeFloat, ...] = Field(default=(0.01,), min_length=1)
    """AdamW's weight decay."""
    optimizer: Literal["vjepa2", "vjepa"] = "vjepa2"
    """`vjepa2`: a constant decay of every parameter. `vjepa`: gradients are clipped to a norm of 1, biases
    and norms do not decay, and a cosine takes the decay to 1e-6."""
    batch_size: PositiveInt = 256
    """Videos of one step of the probe."""
    micro_batch_size: PositiveInt | None = None
    """Videos whose tokens the probe reads at a time; a step adds up their gradients. None: all of a step."""
    seed: int = 0
    """Random seed of the probe's initial weights, of the order of its clips, and of the weights of
    `--random-init`."""
    encode_batch_size: PositiveInt = 16
    """Clips of one forward of a frozen encoder."""
    dtype: ComputeDtype = "auto"
    """Precision of matrix products, as in `compute.dtype`. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    features: Annotated[str | None, COMMAND_ONLY] = None
    """Folder that keeps the tokens of frozen encoders, in float16, so that the next probe need not compute
    them. None: they are kept in memory."""
    max_feature_bytes: Annotated[PositiveInt, COMMAND_ONLY] = 16_000_000_000
    """Most memory that the clips and tokens of one encoder may take on a worker, in bytes."""
    resume: Annotated[bool, COMMAND_ONLY] = False
    """Continue a probe that was killed, after its last complete epoch; give the same `out`."""
    workers: Annotated[NonNegativeInt, COMMAND_ONLY] = 0
    """Ray Train workers, which share the forwards and the probe's batches; 0 runs in this process, without
    Ray."""
    cpus_per_worker: Annotated[PositiveFloat, COMMAND_ONLY] = 1.0
    """CPUs that Ray sets aside for a worker; may be a fraction."""
    gpus_per_worker: Annotated[GpusPerWorker, COMMAND_ONLY] = None
    """GPUs that Ray sets aside for a worker; may be a fraction. None: one where Ray has any; 0 runs on the
    CPU."""
    device: Annotated[Device, COMMAND_ONLY] = "auto"
    """`auto`: GPUs where there are any, else the CPU. `cpu`: the CPU."""
    address: Annotated[str | None, COMMAND_ONLY] = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the
    command."""
    num_threads: Annotated[PositiveInt, COMMAND_ONLY] = 1
    """CPU threads of encoder and probe, on each worker."""
    loader: Annotated[LoaderConfig, COMMAND_ONLY] = LoaderConfig()

    def settings(self) -> dict[str, JsonValue]:
        """What decides a probe's weights, as JSON."""
        fields = type(self).model_fields.items()
        without = {name for name, field in fields if COMMAND_ONLY in field.metadata}
        return self.model_dump(mode="json", exclude=without)

    @property
    def extras(self) -> tuple[str, ...]:
        return ("eval", "train") if self.workers else ("eval",)  # it draws confusion matrices

    @property
    def fewest_workers(self) -> int:
        """As many as are asked for."""
        return self.workers

    @property
    def most_workers(self) -> int:
        """As many as are asked for."""
        return self.workers

    @model_validator(mode="after")
    def _keeps_what_stays(self) -> Self:
        require_one_device(self.device, self.gpus_per_worker)
        if self.augment and self.features is not None:
            raise ValueError(
                "got --features with --augment, expected one of them: tokens of clips that change are of no"
                " use later"
            )
        if self.augment_with == "images" and (self.segments, self.views) != (1, 1):
            raise ValueError(
                f"got --augment-with images with {self.segments} segments and {self.views} views, expected"
                " one of each: an image has no others"
            )
        return self


class PhysicsConfig(Config):
    """`salt-eval physics`: how surprised a model is by impossible videos (arXiv:2509.24317, Appendix D)."""

    places = ("data", "out")

    ckpt: str
    """The model: the run directory or checkpoint of a student (SALT), of the baseline or of stage 1, or the
    directory of a VideoMAE with its decoder. The last two predict normalised pixels."""
    teacher: str | None = None
    """The frozen teacher that a student learned from, in any form that `salt-serve teacher --ckpt` takes. Not
    for the baseline, whose teacher is in its checkpoint, and not for models that predict pixels."""
    data: str
    """Folder of the benchmark, as it is distributed; of InfLevel with the lists of pairs, `continuity.csv`,
    `gravity.csv` and `solidity.csv`."""
    benchmark: Literal["intphys", "grasp", "inflevel"] = "intphys"
    """The benchmark whose folders these are. `salt-data scenes` writes folders like those of `intphys`."""
    out: str
    """JSON file of the accuracies and of each video's surprise."""
    window: PositiveInt | None = None
    """Frames of a window, context and future; none: those of a clip of the checkpoint, twice as many for
    InfLevel unless its positions are absolute (VideoMAE)."""
    context: tuple[PositiveInt, ...] = ()
    """Frames of a window that the student sees; none: 1/8, 2/8, 3/8, 4/8 and 5/8 of it."""
    stride: PositiveInt = 2
    """Frames from one window to the next, counted in frames that were taken from the video (the paper's
    s)."""
    frame_step: PositiveInt | None = None
    """Frames of a video from one that is taken to the next; none: 2 for IntPhys, 10 for GRASP, 5 for
    InfLevel."""
    crop_size: CropSize | None = None
    """Height and width of a window, in pixels; none: those of a clip of the checkpoint."""
    batch_size: PositiveInt = 16
    """Windows of one forward."""
    num_threads: PositiveInt = 1
    """CPU threads of the models."""


class RankConfig(Config):
    """`salt-eval rank`: RankMe and k-NN accuracy, of the mean of a clip's tokens. Nothing is trained."""

    ckpt: tuple[str, ...] = Field(min_length=1)
    """Frozen encoder to judge: whatever `salt-serve teacher --ckpt` takes."""
    data: str
    """Packed data set. If it has labels and a split `train`, the clips of `split` are also classified by
    their nearest neighbours."""
    out: str
    """JSON file of what was found."""
    split: str = "test"
    """Split whose features are measured. It needs at least as many clips as the widest encoder has channels
    (the paper's RankMe: 25,600)."""
    k: PositiveInt = 20
    """Nearest training clips that vote."""
    random_init: bool = False
    """Also judge an encoder like the first checkpoint's with random weights."""
    seed: int = 0
    """Random seed of the weights of `--random-init`: the same seed gives the weights of `salt-eval probe`."""
    num_frames: PositiveInt | None = None
    """Frames of a clip; none: what each checkpoint says, 16 where it says nothing."""
    crop_size: CropSize | None = None
    """Height and width of a clip, in pixels; none: what each checkpoint says, 224 where it says nothing."""
    encode_batch_size: PositiveInt = 16
    """Clips of one forward of an encoder."""
    dtype: ComputeDtype = "auto"
    """Precision of matrix products, as in `compute.dtype`. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    num_threads: PositiveInt = 1
    """CPU threads of an encoder."""
    loader: LoaderConfig = LoaderConfig()


class SelectConfig(Config):
    """`salt-eval select`: which run is best, from what costs no probe."""

    run_dirs: tuple[str, ...] = Field(min_length=1)
    """Run directories of students."""
    teacher: tuple[str, ...] = Field(min_length=1)
    """Frozen teacher that they learned from; only for `--by teacher-loss` and `--by rankme` several."""
    data: str
    """Packed data set with clips that no run has learned from."""
    split: str = "test"
    """Split that these are."""
    out: str
    """JSON file of what was found; where three checkpoints or more were probed, a picture is written beside
    it."""
    probe: str | None = None
    """JSON file of `salt-eval probe` with the accuracies of some of the runs or checkpoints; none: the number
    of `--by` alone."""
    label: str | None = None
    """Label whose accuracy is used; none: the only one."""
    by: Literal["student-loss", "student-rankme", "teacher-loss", "rankme"] = "student-loss"
    """What is compared with the accuracy: a student's loss (Figure 3) or RankMe (Figure 10), or its teacher's
    loss or RankMe (Figure 9)."""
    max_clips: PositiveInt | None = None
    """Most clips that the number is of; none: 512 for a loss, and 25,600 for RankMe (the paper's), which
    needs more clips than the encoder has channels."""
    seed: int = 0
    """Decides the masks, the same for every checkpoint."""
    batch_size: PositiveInt = 16
    """Clips of one forward of a teacher."""
    num_threads: PositiveInt = 1
    """CPU threads of the models."""
    loader: LoaderConfig = LoaderConfig()

    @property
    def num_clips(self) -> int:
        """Most clips that the number is of."""
        return self.max_clips or (25_600 if self.by in ("rankme", "student-rankme") else 512)

    @property
    def extras(self) -> tuple[str, ...]:
        return ("eval",)

    @model_validator(mode="after")
    def _label_of_a_probe(self) -> Self:
        if self.label is not None and self.probe is None:
            raise ValueError("got --label without --probe, expected both: it is a label of the probe")
        return self


class ExportConfig(Config):
    """`salt-eval export`: a checkpoint in a form that other code loads."""

    ckpt: str
    """Run directory or checkpoint."""
    format: Literal["hf", "vjepa2"]
    """`hf`: a directory for `transformers.VJEPA2Model`. `vjepa2`: a `.pt` file for V-JEPA 2's own code."""
    out: str
    """The directory or file to write; it must not exist."""
    num_frames: PositiveInt | None = None
    """Frames of the clips that it is meant for; none: the checkpoint's."""
    crop_size: CropSize | None = None
    """Height and width of the clips that it is meant for, in pixels; none: the checkpoint's. `transformers`
    is right for no other."""
    probe: str | None = None
    """`probe.safetensors` of `salt-eval probe`: the directory is then a `VJEPA2ForVideoClassification`."""
    label: str | None = None
    """Label whose probe is exported; none: the only one."""


class PicturesConfig(Config):
    """`salt-eval pictures`: what encoders make of clips."""

    ckpt: tuple[str, ...] = Field(min_length=1)
    """Frozen encoder to look into: whatever `salt-serve teacher --ckpt` takes. A run of ours shows its masks
    too, and what it predicts."""
    data: str
    """Packed data set; the first clips of it are shown."""
    out: str
    """Folder for a PNG and an mp4 of each clip."""
    teacher: str | None = None
    """Frozen teacher of the students among `--ckpt`: shows where their predictions agree with its latents."""
    num_clips: PositiveInt = 4
    """Clips to show; the colours are those of all of them together."""
    split: str = "all"
    """Split of the data set; `all` takes every sample."""
    num_frames: PositiveInt | None = None
    """Frames of a clip; none: what each checkpoint says, 16 where it says nothing."""
    crop_size: CropSize | None = None
    """Height and width of a clip, in pixels; none: what each checkpoint says, 224 where it says nothing."""
    seed: int = 0
    """Decides the masks."""
    num_threads: PositiveInt = 1
    """CPU threads."""
    loader: LoaderConfig = LoaderConfig()

    @property
    def extras(self) -> tuple[str, ...]:
        return ("eval",)


class FlopsConfig(Config):
    """Compute of a training run, by the paper's 6ND and exactly."""

    teacher: str | None = None
    """What the run learns from: the preset of a frozen teacher (SALT), `ema` for a moving average of its own
    encoder (V-JEPA 2). None: pixels (V-Pixel)."""
    teacher_steps: tuple[PositiveInt, ...] = ()
    """Steps that the frozen teacher trained, to count them too: V-Pixel first, then for each repetition a
    student that becomes the next teacher."""
    steps: PositiveInt = 160_000
    """Optimizer steps of the run itself."""
    batch_size: PositiveInt = 3072
    """Clips per step, all workers together."""
    seed: int = 0
    """Decides the masks whose tokens are counted."""
    paper: bool = False
    """The paper's Tables 10, 11 and 16 beside ours, instead of one run."""
    json_: bool = False
    """One JSON object for programs, instead of tables for people."""
    encoder: EncoderConfig = EncoderConfig()
    predictor: PredictorConfig = PredictorConfig()
    view: ViewConfig = ViewConfig()
    mask: MaskConfig = MaskConfig()

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        require_whole_cubes(self.view, self.encoder)
        if self.teacher not in (None, "ema", *PRESETS):
            raise ValueError(
                f"got teacher {self.teacher!r}, expected ema, or the preset of a frozen teacher:"
                f" {', '.join(PRESETS)}"
            )
        if self.teacher_steps and self.teacher in (None, "ema"):
            raise ValueError(
                "got --teacher-steps without a frozen teacher, expected --teacher PRESET with it"
            )
        if self.paper:
            changed = [
                name
                for name in type(self).model_fields
                if name not in ("paper", "json_") and getattr(self, name) != _default(name)
            ]
            if changed:
                raise ValueError(
                    f"got --paper with {', '.join(changed)}, expected --paper alone: it shows the paper's own"
                    " runs"
                )
        return self


def _default(name: str) -> object:
    return FlopsConfig.model_fields[name].get_default(call_default_factory=True)


class FidelityConfig(Config):
    """Every number oracle of the method."""

    out: str = "docs/fidelity.md"
    """The page, in Markdown."""
