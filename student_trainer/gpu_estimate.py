"""`salt-train ... --estimate --gpu NAME`: whether a run fits a GPU that is not here, and how long a step
takes on it at least; from fake tensors, nothing of it measured."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from salt_distill.common.config import (
    MASK_GROUP_SIZE,
    EncoderConfig,
    FrozenConfig,
    GpuName,
    StudentRun,
    TeacherRun,
    TrainConfig,
)
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.flops import (
    Flops,
    encoder_parameters,
    predictor_parameters,
    six_n_d,
)
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import group_idx
from salt_distill.common.model.roofline import BEST, GPUS, WORST, Gpu, seconds
from salt_distill.common.targets import codec
from salt_distill.student_trainer.run_flops import NAMES
from salt_distill.student_trainer.step_count import StepCount, TeacherCount, count_step, count_teacher
from salt_distill.student_trainer.targets.source import open_sources
from salt_distill.student_trainer.vpixel import pixel_width

CONTEXT_BYTES = 1.0e9
"""Of a GPU's memory that CUDA, its libraries and their work space take. Assumed."""
FRAGMENTS = 1.05
"""What an allocator holds over what tensors hold. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run, and the memory that it takes of each GPU, in bytes."""

    settings: str
    memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """What `salt-plan` takes of a student or a teacher."""

    clips_per_s: float
    """Of one GPU, at the slow end of the band."""
    six_n_d: float
    """Of the whole run: tells sizes apart."""


@dataclass(frozen=True, kw_only=True)
class GpuEstimate:
    """What is printed, and written as JSON."""

    objective: str
    steps: int
    batch_size: int
    device: str
    """The GPU's name, and that it was counted."""
    dtype: str
    student: Part
    teacher: Part | None
    """The teachers in the same process."""
    gpu: str
    workers: int
    clips_per_worker: int
    memory_bytes: float
    """Of the fullest GPU."""
    state_bytes: float
    """Of it: weights, gradients, optimizer."""
    activation_bytes: float
    """Of it: what one mask group's backward needs."""
    target_bytes: float
    """Of it: targets on their way."""
    teacher_bytes: float
    """Of it: a teacher in the same process."""
    gpu_memory_bytes: float
    fits: bool
    would_fit: tuple[Way, ...]
    """Other ways, where it does not."""
    step_s: tuple[float, float]
    """From what the best kernels would take to what poor ones would."""
    run_s: tuple[float, float]
    flops: float
    """Of a worker's step."""


def run(config: TrainConfig) -> None:
    """Prints the estimate, and writes it as JSON to ``config.estimate_out``."""
    assert config.gpu is not None, "its caller looked"
    estimate = estimate_on(config, config.gpu)
    if config.estimate_out is not None:
        Path(config.estimate_out).write_text(json.dumps(asdict(estimate), indent=2) + "\n")
    console = Console()
    for sentence in _sentences(config, estimate):
        console.print(sentence, highlight=False, soft_wrap=True)


def expected_run_s(
    config: TrainConfig, name: GpuName, elsewhere: Sequence[int]
) -> tuple[float, float] | None:
    """The time of the run as ``estimate_on`` has it, in a moment: all blocks of a model cost alike, so that
    models of one and two tell what deeper ones take. None where a teacher in this process cannot be counted.

    ``elsewhere``: channels of the targets of each teacher in no process of the run.
    """
    counts = [_count(config, ckpt) for ckpt in config.teacher_ckpt] if isinstance(config, StudentRun) else []
    teachers = [count for count in counts if count is not None]
    if len(teachers) < len(counts):
        return None
    widths = [*elsewhere, *(teacher.width for teacher in teachers)] or [config.encoder.width]

    def step_s(encoder: int, predictor: int) -> np.ndarray:
        depths = {
            "encoder": config.encoder.model_copy(update={"depth": encoder}),
            "predictor": config.predictor.model_copy(update={"depth": predictor}),
        }
        return np.array(_estimate(config.model_copy(update=depths), name, widths, teachers).step_s)

    least, deeper_encoder, deeper_predictor = step_s(1, 1), step_s(2, 1), step_s(1, 2)
    of_encoder = (config.encoder.depth - 1) * (deeper_encoder - least)
    of_predictor = (config.predictor.depth - 1) * (deeper_predictor - least)
    low, high = config.steps * (least + of_encoder + of_predictor)
    return float(low), float(high)


def estimate_on(config: TrainConfig, name: GpuName) -> GpuEstimate:
    """The run on GPUs of that name, each of its workers on one."""
    return _estimate(config, name, *_teachers(config))


def _estimate(
    config: TrainConfig, name: GpuName, widths: Sequence[int], teachers: Sequence[TeacherCount]
) -> GpuEstimate:
    """``widths``: channels of each teacher's targets. ``teachers``: those beside the student."""
    gpu, workers = GPUS[name], max(config.most_workers, 1)
    if config.compute.dtype == "auto":
        config = _computing(config, dtype="bfloat16")
    num_groups = len(group_idx(config.batch_size, 0, workers))
    num_clips = min(num_groups * MASK_GROUP_SIZE, config.batch_size)
    step = count_step(config, *widths)
    target_bytes = 0
    if isinstance(config, StudentRun):
        num_tokens = token_grid(config.view, config.encoder).num_tokens
        clip_bytes = sum(codec.num_bytes(config.target_dtype, num_tokens, width) for width in widths)
        ahead = num_clips * (config.loader.prefetch_steps + 1)
        target_bytes = clip_bytes * (ahead if teachers else min(num_clips, MASK_GROUP_SIZE))
    others = target_bytes + sum(teacher.peak_bytes for teacher in teachers)
    needed = _memory(step, config.compute.sharding, workers, others)
    fits = needed <= gpu.memory_bytes
    reached = (BEST, WORST)
    student_s = [num_groups * seconds(step.group, gpu, r) + seconds(step.optimizer, gpu, r) for r in reached]
    teacher_s = [
        sum(-(-num_clips // teacher.batch_size) * seconds(teacher.forward, gpu, r) for teacher in teachers)
        for r in reached
    ]
    step_s = [of_student + of_teacher for of_student, of_teacher in zip(student_s, teacher_s, strict=True)]
    flops = _paper_flops(config, sum(widths), teachers) * (config.steps * config.batch_size)
    return GpuEstimate(
        objective=config.objective,
        steps=config.steps,
        batch_size=config.batch_size,
        device=f"{name}, counted",
        dtype=config.compute.dtype,
        student=Part(clips_per_s=num_clips / student_s[1], six_n_d=flops.encoder + flops.predictor),
        teacher=Part(clips_per_s=num_clips / teacher_s[1], six_n_d=flops.teacher) if teachers else None,
        gpu=name,
        workers=workers,
        clips_per_worker=num_clips,
        memory_bytes=needed,
        state_bytes=step.state_bytes,
        activation_bytes=step.peak_bytes - step.state_bytes,
        target_bytes=target_bytes,
        teacher_bytes=others - target_bytes,
        gpu_memory_bytes=gpu.memory_bytes,
        fits=fits,
        would_fit=() if fits else _ways(config, step, widths, gpu, others),
        step_s=(step_s[0], step_s[1]),
        run_s=(config.steps * step_s[0], config.steps * step_s[1]),
        flops=float(sum(number * kernel.flops for kernel, number in step.group.items()) * num_groups),
    )


def _teachers(config: TrainConfig) -> tuple[list[int], list[TeacherCount]]:
    """Channels of each teacher's targets, and the teachers that run beside the student. Reads no weights."""
    if not isinstance(config, StudentRun):
        return [config.encoder.width], []
    widths, counts = [], []
    elsewhere = config.model_copy(update={"teacher_ckpt": ()})
    for source in open_sources(elsewhere, run="estimate") if config.on_teacher_loss != "local" else ():
        with closing(source):
            widths.append(source.spec.width)
    for ckpt in config.teacher_ckpt:
        count = _count(config, ckpt)
        if count is None:
            raise ValueError(
                f"got --teacher-ckpt {ckpt} with --gpu, expected a video ViT of ours, whose forward can be"
                " counted: leave --teacher-ckpt out to count a student whose targets come from elsewhere"
            )
        widths.append(count.width)
        counts.append(count)
    return widths or [config.encoder.width], counts


def _count(config: StudentRun, ckpt: str) -> TeacherCount | None:
    """A teacher in the student's process; None for one of others."""
    frozen = open_encoder(FrozenConfig(ckpt=ckpt)).config
    if not isinstance(frozen, EncoderConfig):
        return None
    return count_teacher(frozen, config.view.clip_shape, config.teacher.batch_size)


def _computing(config: TrainConfig, **compute: str | bool) -> TrainConfig:
    return config.model_copy(update={"compute": config.compute.model_copy(update=compute)})


def _memory(count: StepCount, sharding: str, workers: int, others: float) -> float:
    """Bytes of a GPU. ``others``: what is there beside the step."""
    state, activations = float(count.state_bytes), count.peak_bytes - count.state_bytes
    if workers > 1 and sharding == "fsdp":  # two blocks are whole: one computes, the next one comes
        state = state / workers + 2 * count.largest_block_bytes
    elif workers > 1:  # gradients are exchanged in buckets
        state += count.weight_bytes
    return CONTEXT_BYTES + FRAGMENTS * (state + activations + others)


def _ways(
    config: TrainConfig, step: StepCount, widths: Sequence[int], gpu: Gpu, others: float
) -> tuple[Way, ...]:
    """Settings with which a run would fit that does not."""
    if not config.compute.activation_checkpointing:
        step = count_step(_computing(config, activation_checkpointing=True), *widths)
    workers, sharding = max(config.most_workers, 1), config.compute.sharding
    most_workers = -(-config.batch_size // MASK_GROUP_SIZE)  # a worker takes whole mask groups
    ways = []
    for kind, number in dict.fromkeys([(sharding, workers), ("fsdp", 2), ("fsdp", 8), ("fsdp", 32)]):
        memory_bytes = _memory(step, kind, number, others)
        if workers <= number <= most_workers and memory_bytes <= gpu.memory_bytes:
            settings = f"activation checkpointing, {kind} on {number} workers"
            ways.append(Way(settings=settings, memory_bytes=memory_bytes))
    return tuple(ways)


def _paper_flops(config: TrainConfig, out_width: int, teachers: Sequence[TeacherCount]) -> Flops:
    """6ND of one clip."""
    if isinstance(config, TeacherRun):
        out_width = pixel_width(config.encoder)
    return six_n_d(
        num_tokens=token_grid(config.view, config.encoder).num_tokens,
        num_sets=len(config.mask.sets),
        encoder_parameters=encoder_parameters(config.encoder),
        predictor_parameters=predictor_parameters(
            config.predictor,
            in_width=config.encoder.width,
            out_width=out_width,
            num_mask_tokens=len(config.mask.sets),
        ),
        teacher_parameters=sum(teacher.num_parameters for teacher in teachers),
    )


def _sentences(config: TrainConfig, estimate: GpuEstimate) -> list[str]:
    def gb(num_bytes: float) -> str:
        return f"{num_bytes / 1e9:.1f} GB"

    verdict = "fits" if estimate.fits else "does not fit"
    low, high = estimate.step_s
    sentences = [
        f"{NAMES[estimate.objective]}, {estimate.clips_per_worker} clips on each of {estimate.workers}"
        f" {estimate.gpu}: {verdict}. It takes {gb(estimate.memory_bytes)} of"
        f" {gb(estimate.gpu_memory_bytes)}: weights, gradients and optimizer {gb(estimate.state_bytes)},"
        " activations of a mask group"
        f" {gb(estimate.activation_bytes)}, targets {gb(estimate.target_bytes)}, teacher"
        f" {gb(estimate.teacher_bytes)}; {gb(CONTEXT_BYTES)} and {FRAGMENTS - 1:.0%} are added for CUDA and"
        " the allocator.",
        f"A step: {1000 * low:,.0f} to {1000 * high:,.0f} ms; {config.steps:,} steps:"
        f" {estimate.run_s[0] / 3600:,.1f} to {estimate.run_s[1] / 3600:,.1f} hours.",
        "Counted on fake tensors, kernel by kernel as PyTorch launches them without compilation, and not"
        " measured. Not in it: reading, decoding, and what workers exchange.",
    ]
    if not estimate.fits:
        ways = "; ".join(f"{way.settings} ({gb(way.memory_bytes)})" for way in estimate.would_fit)
        sentences.insert(
            1, f"It would fit with: {ways}." if ways else "No setting of ours would make it fit."
        )
    return sentences
