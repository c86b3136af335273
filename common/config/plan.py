"""Planning runs that share a teacher: ``salt-plan``."""

from typing import Any, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from salt_distill.common.config.base import Config
from salt_distill.common.config.layers import choice
from salt_distill.common.config.model import GpuName, TargetDtype, Views
from salt_distill.common.config.presets import PRESETS


class PlannedStudent(Config):
    """Student runs of one size; on a command line PRESET or PRESET,runs=2,gpus=8,clips_per_s=50."""

    preset: str
    """Size of encoder and predictor."""
    runs: PositiveInt = 1
    """Runs of this size at a time."""
    gpus: PositiveInt = 1
    """GPUs of each of them."""
    clips_per_s: PositiveFloat | None = None
    """Clips that one GPU trains on per second, without waiting for targets."""
    estimate: str | None = None
    """Or the JSON file of `salt-train student --estimate --estimate-out FILE` on such a GPU."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        preset, *settings = value.split(",")
        pairs = [setting.partition("=") for setting in settings]
        if not preset or "=" in preset or not all(separator for _, separator, _ in pairs):
            raise ValueError(f"got {value!r}, expected PRESET, or PRESET,runs=2,gpus=8,clips_per_s=50")
        return {"preset": preset} | {name: text for name, _, text in pairs}

    @model_validator(mode="after")
    def _one_speed(self) -> Self:
        require_preset("student", self.preset)
        if self.clips_per_s is not None and self.estimate is not None:
            raise ValueError(
                f"got clips_per_s and estimate of the student {self.preset}, expected one of them"
            )
        return self


class PlanConfig(Config):
    """What is to be trained, on what, at what price."""

    student: tuple[PlannedStudent, ...] = Field(min_length=1)
    """Student runs, all of one data seed: PRESET or PRESET,runs=2,gpus=8,clips_per_s=50 (or
    estimate=FILE)."""
    teacher: str = "vit-l"
    """Preset of the frozen teacher."""
    teacher_clips_per_s: PositiveFloat | None = None
    """Clips that one GPU's teacher computes per second."""
    teacher_estimate: str | None = None
    """Or the JSON file of `salt-train student --teacher-ckpt CKPT --estimate --estimate-out FILE` on such a
    GPU."""
    gpu: GpuName | None = None
    """Or the GPU: speeds that are not given are then counted, kernel by kernel, from its data sheet, at what
    slow kernels reach."""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """Or the share of the dense bfloat16 peak of `--gpu` that a step reaches, instead of the count."""
    gpu_tflops: PositiveFloat | None = None
    """Or what a GPU reaches, in TFLOP/s, instead of `--gpu`."""
    steps: PositiveInt = 160_000
    """Optimizer steps of each run."""
    batch_size: PositiveInt = 3072
    """Clips per step."""
    samples: PositiveInt | None = None
    """Number of samples in the data set."""
    views: Views = "fresh"
    """Views per sample, as in `salt-train`: `fresh` ones are never seen again, a number K repeats K pinned
    ones."""
    target_dtype: TargetDtype = "float16"
    """Rounding of the targets on the wire and on disk."""
    teacher_replicas: PositiveInt | None = None
    """Teacher replicas, a GPU each; None: as many as the students need."""
    gpus: PositiveInt | None = None
    """All GPUs, of students and teacher together. If the runs ask for more, they take turns. None: as many as
    they ask for."""
    link_gbps: PositiveFloat
    """Network link of a machine, in Gbit/s each way."""
    gpus_per_machine: PositiveInt = 8
    """GPUs that share it."""
    decode_clips_per_s: PositiveFloat
    """Clips that the cores beside one GPU decode per second."""
    disk_gb_per_s: PositiveFloat
    """What the disk of the targets reads and writes, in GB/s, all machines together."""
    disk_tb: PositiveFloat | None = None
    """Room on it, in TB; None: enough."""
    gpu_hour_price: NonNegativeFloat = 3.0
    """Price of a GPU hour, in dollars."""
    tb_month_price: NonNegativeFloat = 23.0
    """Price of a TB on that disk for a month, in dollars."""
    keep_months: PositiveFloat | None = None
    """Months that cached targets are kept; None: until the runs end."""
    json_: bool = False
    """One JSON object for programs, instead of tables for people."""
    chart: str | None = None
    """PNG file for a chart of what each choice costs and what limits it."""

    @property
    def extras(self) -> tuple[str, ...]:
        return ("eval",) if self.chart else ()

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        require_preset("teacher", self.teacher)
        given = [
            name for name in ("teacher_clips_per_s", "teacher_estimate") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError("got --teacher-clips-per-s with --teacher-estimate, expected one of them")
        if self.gpu is not None and self.gpu_tflops is not None:
            raise ValueError("got --gpu with --gpu-tflops, expected one of them")
        if self.mfu is not None and self.gpu is None:
            raise ValueError("got --mfu without --gpu, expected both: it is a share of that GPU's peak")
        if self.gpu is None and self.gpu_tflops is None:
            if not given:
                raise ValueError(
                    "got no clips/s of the teacher: give --teacher-clips-per-s, or --teacher-estimate FILE of"
                    " `salt-train student --teacher-ckpt CKPT --estimate --estimate-out FILE`, or --gpu or"
                    " --gpu-tflops"
                )
            for student in self.student:
                if student.clips_per_s is None and student.estimate is None:
                    raise ValueError(
                        f"got no clips/s of the student {student.preset}: give --student"
                        f" {student.preset},clips_per_s=NUMBER, or estimate=FILE of `salt-train student"
                        " --estimate --estimate-out FILE`, or --gpu or --gpu-tflops"
                    )
        if self.views != "fresh" and self.samples is None:
            raise ValueError(
                f"got --views {self.views} without the size of the data set, expected --samples: a cache"
                " holds each view of each sample"
            )
        return self


def require_preset(role: str, preset: str) -> None:
    """Raises ValueError unless it is one."""
    if preset not in PRESETS:
        raise ValueError(choice(role, preset, PRESETS))
