"""`salt-train ... --estimate --gpu NAME`: whether a run fits a GPU that is not here, and how long a step
takes on it at least; from fake tensors, nothing of it measured."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import (
    MASK_GROUP_SIZE,
    EncoderConfig,
    FrozenConfig,
    GpuName,
    StudentRun,
    TrainConfig,
)
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.compute import cast_products, set_up
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import MaskGroup, group_idx, mask_group
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.roofline import BEST, GPUS, WORST, Gpu, Kernel, Kernels, PeakMemory, Reached
from salt_distill.common.model.vit import Block, Encoder
from salt_distill.common.targets import codec
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.loop import update
from salt_distill.student_trainer.objective import Objective, uninitialised_objective
from salt_distill.student_trainer.optim import new_optimizer
from salt_distill.student_trainer.parallel import clip_gradients
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.run_flops import NAMES
from salt_distill.student_trainer.targets.source import open_source
from salt_distill.student_trainer.vjepa import VJepa

CONTEXT_BYTES = 1.0e9
"""Of a GPU's memory that CUDA, its libraries and their work space take. Assumed."""
FRAGMENTS = 1.05
"""What an allocator holds over what tensors hold. Assumed."""
NUM_DRAWN = 16
"""Steps whose masks are looked at: for the group that keeps the most tokens, and for one that keeps as many
as most do."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """A worker's step on one mask group after the other."""

    state_bytes: int
    """Weights, gradients and the optimizer's state."""
    peak_bytes: int
    """Most that tensors hold in a step: the state, and what the backward needs of one mask group."""
    largest_block_bytes: int
    """Weights of the largest block and its gradient: what a sharded model holds whole."""
    weight_bytes: int
    """Of what learns, in float32."""
    group: Counter[Kernel]
    """Forward and backward of one mask group."""
    optimizer: Counter[Kernel]
    """Once a step."""


@dataclass(frozen=True, kw_only=True)
class TeacherCount:
    """A teacher in the student's process."""

    weight_bytes: int
    peak_bytes: int
    """With what its forward holds."""
    batch_size: int
    forward: Counter[Kernel]
    """Of one batch."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run, and the memory that it takes of each GPU, in bytes."""

    settings: str
    memory_bytes: float
    fits: bool


@dataclass(frozen=True, kw_only=True)
class GpuEstimate:
    """What is printed, and written as JSON."""

    objective: str
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


def estimate_on(config: TrainConfig, name: GpuName) -> GpuEstimate:
    """The run on GPUs of that name, each of its workers on one."""
    gpu, workers = GPUS[name], max(config.most_workers, 1)
    if config.compute.dtype == "auto":
        config = _computing(config, dtype="bfloat16")
    num_groups = len(group_idx(config.batch_size, 0, workers))
    num_clips = min(num_groups * MASK_GROUP_SIZE, config.batch_size)
    out_width, teacher = _teacher(config)
    step = count_step(config, out_width)
    target_bytes = 0
    if isinstance(config, StudentRun):
        clip_bytes = codec.num_bytes(
            config.target_dtype, token_grid(config.view, config.encoder).num_tokens, out_width
        )
        ahead = num_clips * (config.loader.prefetch_steps + 1)
        target_bytes = clip_bytes * (ahead if teacher is not None else min(num_clips, MASK_GROUP_SIZE))
    teacher_bytes = 0 if teacher is None else teacher.peak_bytes

    def memory(count: StepCount, sharding: str, workers: int, share: float = 1.0) -> float:
        state, activations = float(count.state_bytes), share * (count.peak_bytes - count.state_bytes)
        if workers > 1 and sharding == "fsdp":  # two blocks are whole: one computes, the next one comes
            state = state / workers + 2 * count.largest_block_bytes
        elif workers > 1:  # gradients are exchanged in buckets
            state += count.weight_bytes
        return CONTEXT_BYTES + FRAGMENTS * (state + activations + target_bytes + teacher_bytes)

    needed = memory(step, config.compute.sharding, workers)
    ways: list[Way] = []
    if needed > gpu.memory_bytes:
        again = step
        if not config.compute.activation_checkpointing:
            again = count_step(_computing(config, activation_checkpointing=True), out_width)
        for sharding, number in ((config.compute.sharding, workers), ("fsdp", 2), ("fsdp", 8), ("fsdp", 32)):
            if number >= workers:
                ways.append(_way(gpu, f"{sharding}, {number} workers", memory(again, sharding, number)))
        share = 12 / min(num_clips, MASK_GROUP_SIZE)
        ways.append(
            _way(gpu, "fsdp, 8 workers, 12 clips a forward", memory(again, "fsdp", max(8, workers), share))
        )
    seconds = [_seconds(step, teacher, num_groups, num_clips, gpu, reached) for reached in (BEST, WORST)]
    return GpuEstimate(
        objective=config.objective,
        gpu=name,
        workers=workers,
        clips_per_worker=num_clips,
        memory_bytes=needed,
        state_bytes=step.state_bytes,
        activation_bytes=step.peak_bytes - step.state_bytes,
        target_bytes=target_bytes,
        teacher_bytes=teacher_bytes,
        gpu_memory_bytes=gpu.memory_bytes,
        fits=needed <= gpu.memory_bytes,
        would_fit=tuple(way for way in ways if way.fits),
        step_s=(seconds[0], seconds[1]),
        run_s=(config.steps * seconds[0], config.steps * seconds[1]),
        flops=float(sum(number * kernel.flops for kernel, number in step.group.items()) * num_groups),
    )


def count_step(config: TrainConfig, out_width: int) -> StepCount:
    """A worker's step on fake tensors: the loop's own, so that whatever changes there is counted."""
    workers = max(config.most_workers, 1)
    num_groups = min(2, len(group_idx(config.batch_size, 0, workers)))
    usual, largest = masks_of(config)
    with _fake_tensors(), PeakMemory() as memory, Kernels() as kernels:
        objective = uninitialised_objective(config, out_width)
        set_up(objective, config.compute.model_copy(update={"compile": False}), CPU)
        optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
        step_once(objective, optimizer, config, [usual], out_width)  # makes the optimizer's state
        kernels.launches.clear()
        step_once(objective, optimizer, config, [usual], out_width)
        whole = kernels.launches.copy()
        kernels.launches.clear()
        clip_gradients(objective, config.optim, 1)
        optimizer.step()
        if isinstance(objective, VJepa):
            objective.move_target_encoder(step=1, steps=config.steps)
        once = kernels.launches.copy()
        memory.peak_bytes = state_bytes = memory.held_bytes
        step_once(objective, optimizer, config, [largest] * num_groups, out_width)
        blocks = [module for module in objective.modules() if isinstance(module, Block)]
        learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        return StepCount(
            state_bytes=state_bytes,
            peak_bytes=memory.peak_bytes,
            largest_block_bytes=2 * max(sum(p.nbytes for p in block.parameters()) for block in blocks),
            weight_bytes=sum(parameter.nbytes for parameter in learning),
            group=whole - once,
            optimizer=once,
        )


def count_teacher(
    config: EncoderConfig, clip_shape: tuple[int, int, int, int], batch_size: int
) -> TeacherCount:
    """A frozen encoder's forward in bfloat16 on fake tensors."""
    with _fake_tensors(), PeakMemory() as memory, Kernels() as kernels, torch.no_grad():
        encoder = Encoder(config)
        cast_products(encoder)
        weight_bytes = sum(parameter.nbytes for parameter in encoder.parameters())
        base = memory.held_bytes
        memory.peak_bytes = base
        kernels.launches.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            codec.pack(encoder(normalise(torch.empty(batch_size, *clip_shape, dtype=torch.uint8))), "float16")
        return TeacherCount(
            weight_bytes=weight_bytes,
            peak_bytes=memory.peak_bytes - base + weight_bytes,
            batch_size=batch_size,
            forward=kernels.launches.copy(),
        )


@contextmanager
def _fake_tensors() -> Iterator[None]:
    normalise(torch.zeros(1, 1, 1, 1, 3, dtype=torch.uint8))  # its constants are kept, and must be real ones
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def step_once(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    masks: list[MaskGroup],
    out_width: int,
) -> None:
    num_clips = sum(group.size for group in masks)
    clips = ClipBatch(
        pixels=np.empty((num_clips, *config.view.clip_shape), dtype=np.uint8),
        digests=(bytes(32),) * num_clips,
        keys=("",) * num_clips,
        views=(0,) * num_clips,
        good=np.ones(num_clips, dtype=bool),
    )
    target = None
    if isinstance(config, StudentRun):
        num_tokens = token_grid(config.view, config.encoder).num_tokens
        target = codec.empty_packed(num_clips, num_tokens, out_width, config.target_dtype)
    batch = Batch(step=1, clips=clips, masks=masks, target=None)
    update(objective, optimizer, batch, target, config, Worker(rank=0, world_size=1, device=CPU))


def masks_of(config: TrainConfig) -> tuple[MaskGroup, MaskGroup]:
    """Of the first steps' mask groups one that keeps as many tokens as most do, and the one that keeps the
    most."""
    grid = token_grid(config.view, config.encoder)
    groups = [
        mask_group(config.mask, grid, seed=config.seed, step=step, group=0, batch_size=config.batch_size)
        for step in range(1, 1 + NUM_DRAWN)
    ]
    groups.sort(key=lambda group: sum(s.visible_idx.shape[1] + s.hidden_idx.shape[1] for s in group.sets))
    return groups[len(groups) // 2], groups[-1]


def _teacher(config: TrainConfig) -> tuple[int, TeacherCount | None]:
    """Channels of a target, and the teacher that runs beside the student, if one does. Reads no weights."""
    if not isinstance(config, StudentRun):
        return config.encoder.width, None
    if config.teacher_ckpt is None:
        if config.teacher_url is None and config.targets is None:
            return config.encoder.width, None
        with closing(open_source(config, run="estimate")) as source:
            return source.spec.width, None
    frozen = open_encoder(FrozenConfig(ckpt=config.teacher_ckpt)).config
    if not isinstance(frozen, EncoderConfig):
        raise ValueError(
            f"got --teacher-ckpt {config.teacher_ckpt} with --gpu, expected a video ViT of ours, whose"
            " forward can be counted: leave --teacher-ckpt out to count a student whose targets come from"
            " elsewhere"
        )
    return frozen.width, count_teacher(frozen, config.view.clip_shape, config.teacher.batch_size)


def _computing(config: TrainConfig, **compute: str | bool) -> TrainConfig:
    return config.model_copy(update={"compute": config.compute.model_copy(update=compute)})


def _way(gpu: Gpu, settings: str, memory_bytes: float) -> Way:
    return Way(
        settings=f"activation checkpointing, {settings}",
        memory_bytes=memory_bytes,
        fits=memory_bytes <= gpu.memory_bytes,
    )


def _seconds(
    step: StepCount, teacher: TeacherCount | None, num_groups: int, num_clips: int, gpu: Gpu, reached: Reached
) -> float:
    def of(kernels: Counter[Kernel]) -> float:
        return sum(number * kernel.seconds(gpu, reached) for kernel, number in kernels.items())

    seconds = num_groups * of(step.group) + of(step.optimizer)
    return seconds if teacher is None else seconds + -(-num_clips // teacher.batch_size) * of(teacher.forward)


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
