"""What a plan is made of: sizes from presets, speeds from estimates or counted for a GPU."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from salt_distill.common.config import FlopsConfig, GpuName, PlanConfig, PlannedStudent, preset_layer
from salt_distill.common.model.flops import (
    Flops,
    encoder_forward,
    encoder_parameters,
    exact_flops,
    kept_tokens,
    predictor_parameters,
    six_n_d,
)
from salt_distill.common.model.grid import TokenGrid, token_grid
from salt_distill.common.model.roofline import GPUS, Kernel
from salt_distill.common.plan.arithmetic import PlannedTeacher, Site, Student, Work
from salt_distill.common.plan.counted import slowest_clips_per_s, student_kernels, teacher_kernels
from salt_distill.common.targets import codec
from salt_distill.common.text_files import read_text


class EstimatedPart(BaseModel):
    """A student or a teacher of an estimate."""

    clips_per_s: float | None
    """None of a teacher that is elsewhere."""
    six_n_d: float
    """FLOPs of the whole run by the paper's rule: tells sizes apart."""


class StudentFigures(EstimatedPart):
    """A student of an estimate."""

    clips_per_s: float


class EstimateFile(BaseModel):
    """What a plan takes of what `salt-train student --estimate --estimate-out FILE` writes."""

    objective: Literal["salt"]
    steps: int
    batch_size: int
    device: str
    dtype: str
    student: StudentFigures
    teacher: EstimatedPart | None

    @property
    def source(self) -> str:
        """Where its speeds are from: a clock, or with `--estimate --gpu` a count of kernels."""
        return f"{self.device}, {self.dtype}"


class Speed(NamedTuple):
    """Clips per second of one GPU, and where the number is from."""

    clips_per_s: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A plan's inputs, resolved."""

    teacher: PlannedTeacher
    teacher_speed: Speed
    teacher_flops: float
    """Of one forward of one clip, all matrix products."""
    students: tuple[Student, ...]
    student_speeds: tuple[Speed, ...]
    teacher_shares: tuple[float, ...]
    """The teacher's part of a stage-2 step's 6ND, for each size of student."""
    work: Work
    site: Site


def gather(config: PlanConfig) -> Facts:
    """Everything that the arithmetic needs. Raises ValueError where sizes or estimates do not fit."""
    sizes = _sizes(config.teacher)
    grid = token_grid(sizes.view, sizes.encoder)
    flops = float(encoder_forward(sizes.encoder, grid.num_tokens).total)
    tflops = _achieved_tflops(config)
    teacher_speed = _teacher_speed(config, sizes, grid, flops, tflops)
    num_slots = config.steps * config.batch_size
    distinct = (
        num_slots
        if config.views == "fresh" or config.samples is None
        else min(num_slots, config.samples * config.views)
    )
    students, speeds, shares = [], [], []
    for planned in config.student:
        clip = _paper_flops(planned.preset, sizes, grid)
        speed = _student_speed(planned, config, clip.encoder + clip.predictor, tflops)
        name = (
            planned.preset
            if [s.preset for s in config.student].count(planned.preset) == 1
            else f"{planned.preset} on {planned.gpus}"
        )
        students.append(
            Student(name=name, runs=planned.runs, gpus=planned.gpus, clips_per_s=speed.clips_per_s)
        )
        speeds.append(speed)
        shares.append(clip.teacher / clip.total)
    return Facts(
        teacher=PlannedTeacher(
            clips_per_s=teacher_speed.clips_per_s,
            target_bytes=codec.num_bytes(config.target_dtype, grid.num_tokens, sizes.encoder.width),
            clip_bytes=math.prod(sizes.view.clip_shape),
        ),
        teacher_speed=teacher_speed,
        teacher_flops=flops,
        students=tuple(students),
        student_speeds=tuple(speeds),
        teacher_shares=tuple(shares),
        work=Work(num_slots=num_slots, num_distinct=distinct),
        site=Site(
            link_bytes_per_s=link_share(config.link_gbps, config.gpus_per_machine),
            decode_clips_per_s=config.decode_clips_per_s,
            disk_bytes_per_s=config.disk_gb_per_s * 1e9,
            disk_bytes=math.inf if config.disk_tb is None else config.disk_tb * 1e12,
            num_gpus=config.gpus,
            gpu_hour_price=config.gpu_hour_price,
            tb_month_price=config.tb_month_price,
            keep_months=config.keep_months,
        ),
    )


def link_share(gbps: float, num_gpus: int) -> float:
    """Bytes per second of each of the GPUs behind a link."""
    return gbps * 1e9 / 8 / num_gpus


def _sizes(preset: str) -> FlopsConfig:
    return FlopsConfig.model_validate(preset_layer(FlopsConfig, preset))


def _achieved_tflops(config: PlanConfig) -> Speed | None:
    """TFLOP/s that a GPU reaches, where they are given; None: they are counted, or every speed is given."""
    if config.gpu_tflops is not None:
        return Speed(config.gpu_tflops, f"{config.gpu_tflops:g} TFLOP/s")
    if config.gpu is None or config.mfu is None:
        return None
    peak = GPUS[config.gpu].bfloat16_flops / 1e12
    return Speed(config.mfu * peak, f"{config.mfu:g} of {config.gpu}'s {peak:g} TFLOP/s")


def _counted(launches: Counter[Kernel], gpu: GpuName) -> Speed:
    return Speed(slowest_clips_per_s(launches, gpu), f"counted for {gpu}, not measured")


def _teacher_speed(
    config: PlanConfig, sizes: FlopsConfig, grid: TokenGrid, flops: float, tflops: Speed | None
) -> Speed:
    if config.teacher_clips_per_s is not None:
        return Speed(config.teacher_clips_per_s, "given")
    if config.teacher_estimate is not None:
        estimate = _read_estimate(config.teacher_estimate)
        teacher = estimate.teacher
        if teacher is None or teacher.clips_per_s is None:
            raise ValueError(
                f"{config.teacher_estimate}: got an estimate without a teacher in it, expected one with"
                " --teacher-ckpt"
            )
        expected = six_n_d(
            num_tokens=grid.num_tokens,
            num_sets=0,
            encoder_parameters=0,
            predictor_parameters=0,
            teacher_parameters=encoder_parameters(sizes.encoder),
        )
        _check_size(config.teacher_estimate, estimate, "teacher", teacher, expected.teacher, config.teacher)
        return Speed(teacher.clips_per_s, f"{config.teacher_estimate}: {estimate.source}")
    if tflops is None:
        assert config.gpu is not None, "the configuration has checked it"
        return _counted(teacher_kernels(sizes), config.gpu)
    return Speed(tflops.clips_per_s * 1e12 / flops, tflops.source)


def _student_speed(
    planned: PlannedStudent, config: PlanConfig, paper_flops: float, tflops: Speed | None
) -> Speed:
    if planned.clips_per_s is not None:
        return Speed(planned.clips_per_s, "given")
    if planned.estimate is not None:
        estimate = _read_estimate(planned.estimate)
        _check_size(planned.estimate, estimate, "student", estimate.student, paper_flops, planned.preset)
        return Speed(estimate.student.clips_per_s, f"{planned.estimate}: {estimate.source}")
    if tflops is None:
        assert config.gpu is not None, "the configuration has checked it"
        sizes, width = _sizes(planned.preset), _sizes(config.teacher).encoder.width
        return _counted(student_kernels(sizes, width), config.gpu)
    return Speed(tflops.clips_per_s * 1e12 / _exact_flops(planned.preset, config), tflops.source)


def _paper_flops(preset: str, teacher: FlopsConfig, grid: TokenGrid) -> Flops:
    """6ND of one clip of a student of this size. Raises ValueError where it cuts clips otherwise than its
    teacher."""
    student = _sizes(preset)
    if token_grid(student.view, student.encoder) != grid or student.view != teacher.view:
        raise ValueError(
            f"got a student {preset} of another clip than its teacher's, expected presets of one clip: nano"
            " is alone in its own"
        )
    num_sets = len(student.mask.sets)
    predictor = predictor_parameters(
        student.predictor,
        in_width=student.encoder.width,
        out_width=teacher.encoder.width,
        num_mask_tokens=num_sets,
    )
    return six_n_d(
        num_tokens=grid.num_tokens,
        num_sets=num_sets,
        encoder_parameters=encoder_parameters(student.encoder),
        predictor_parameters=predictor,
        teacher_parameters=encoder_parameters(teacher.encoder),
    )


def _exact_flops(preset: str, config: PlanConfig) -> float:
    """Every matrix product of one clip's step, its teacher's left out."""
    sizes, teacher = _sizes(preset), _sizes(config.teacher)
    grid = token_grid(sizes.view, sizes.encoder)
    kept = kept_tokens(sizes.mask, grid, seed=0, batch_size=config.batch_size)
    return exact_flops(
        kept,
        num_tokens=grid.num_tokens,
        encoder=sizes.encoder,
        predictor=sizes.predictor,
        out_width=teacher.encoder.width,
        teacher=None,
    ).total


def _read_estimate(path: str) -> EstimateFile:
    try:
        return EstimateFile.model_validate_json(read_text(path))
    except ValidationError as error:
        raise ValueError(
            f"{path}: got no estimate of a student, expected what `salt-train student --estimate"
            " --estimate-out FILE` writes"
        ) from error


def _check_size(
    path: str, estimate: EstimateFile, role: str, part: EstimatedPart, expected: float, preset: str
) -> None:
    got = part.six_n_d / estimate.steps / estimate.batch_size
    if not math.isclose(got, expected, rel_tol=1e-6):
        raise ValueError(
            f"{path}: got a {role} of {got:.4g} FLOPs a clip by 6ND, expected {preset}'s {expected:.4g}: an"
            " estimate of another size"
        )
