"""Judging encoders and reporting on runs: ``salt-eval``."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from common.config.base import Config
from common.config.train import LoaderConfig


class ProbeConfig(Config):
    """The attentive probe on frozen encoders: one clip, one view, one setting chosen beforehand (Table 7, the fast protocol)."""

    ckpt: tuple[str, ...] = Field(min_length=1)
    """Frozen encoder to judge: whatever `salt-serve teacher --ckpt` takes."""
    data: str
    """Packed data set with labels: the probe learns on its split `train` and is scored on `test`."""
    out: str
    """JSON file of the accuracies."""
    num_frames: PositiveInt | None = None
    """Frames of a clip; none: what each checkpoint says, 16 where it says nothing."""
    crop_size: PositiveInt | None = None
    """Height and width of a clip, in pixels; none: what each checkpoint says, 224 where it says nothing."""
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
    crop_size: PositiveInt | None = None
    """Height and width of the clips that it is meant for, in pixels; none: the checkpoint's. `transformers` is right for no other."""


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
