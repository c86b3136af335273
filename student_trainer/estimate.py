"""`salt-train ... --estimate`: what a run takes in time, FLOPs and memory, from 20 steps on random clips (as
arXiv:2509.24317, Table 11)."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from salt_distill.common.clip import ClipBatch, clip_digest
from salt_distill.common.config import StudentRun, TrainConfig, VJepaRun
from salt_distill.common.devices import device_here, gpus_of_worker, resources_here
from salt_distill.common.model.compute import precision, set_up, wait_for
from salt_distill.common.model.flops import FORWARD_FLOPS, KeptTokens, encoder_forward, kept_tokens
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import MaskGroup, group_idx, mask_group
from salt_distill.common.model.teacher import TeacherSpec, device_kind
from salt_distill.common.targets import codec
from salt_distill.student_trainer import gpu_estimate
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.estimate_table import (
    RunEstimate,
    StudentEstimate,
    TeacherEstimate,
    print_estimate,
)
from salt_distill.student_trainer.loop import Worker, update
from salt_distill.student_trainer.objective import new_objective
from salt_distill.student_trainer.optim import new_optimizer, set_schedule
from salt_distill.student_trainer.run_flops import RunFlops, teacher_architecture
from salt_distill.student_trainer.targets.source import TargetSource, open_sources
from salt_distill.student_trainer.vjepa import VJepa

NUM_WARM_UP, NUM_TIMED = 3, 20
"""Steps before the clock runs, and with it."""
MAX_GROUPS = 2
"""Mask groups of a timed step: as many as it takes until gradients add up in memory. A step's other groups
cost the same."""
MAX_TIMED_S = 300.0
"""On a machine that is too slow for 20 steps, no further step begins after so long."""


def run(config: TrainConfig) -> None:
    """Prints the estimate, and writes it as JSON to ``config.estimate_out``."""
    if config.gpu is not None:
        gpu_estimate.run(config)
        return
    if config.most_workers > 0 and gpus_of_worker(config, resources_here()) == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as Ray does for such a worker
    measured = estimate(config, device_here(config))
    if config.estimate_out is not None:
        Path(config.estimate_out).write_text(json.dumps(asdict(measured), indent=2) + "\n")
    print_estimate(measured)


def estimate(config: TrainConfig, device: torch.device) -> RunEstimate:
    """The whole run, from steps that are timed here."""
    torch.set_num_threads(config.num_threads)
    num_workers = max(config.most_workers, 1)
    ranks = [
        _masks(config, 1, group_idx(config.batch_size, rank, num_workers)) for rank in range(num_workers)
    ]
    num_clips = max(sum(group.size for group in groups) for groups in ranks)
    teacher, teacher_bytes = None, 0
    with ExitStack() as stack:
        sources = []
        for source in open_sources(config, run="estimate") if isinstance(config, StudentRun) else ():
            sources.append(stack.enter_context(closing(source)))
        if isinstance(config, StudentRun):
            held = _held_bytes(device)
            teacher = _teachers(config, sources, device, num_clips)
            teacher_bytes = peak_bytes(device) - held
        # Inside, so that the teachers' weights count among what is held.
        student, student_bytes = _student(config, device, [source.spec for source in sources], num_clips)
    parts = [student] if teacher is None else [student, teacher]
    exact = [part.exact for part in parts if part.exact is not None]
    step_s = sum(part.step_s for part in parts)
    return RunEstimate(
        objective=config.objective,
        steps=config.steps,
        batch_size=config.batch_size,
        workers=num_workers,
        clips_per_worker=num_clips,
        device=device_kind(device),
        num_threads=config.num_threads,
        dtype=precision(config.compute.dtype, device),
        student=student,
        teacher=teacher,
        step_s=step_s,
        run_s=config.steps * step_s,
        worker_s=num_workers * config.steps * step_s,
        six_n_d=sum(part.six_n_d for part in parts),
        exact=sum(exact) if len(exact) == len(parts) else None,
        peak_memory_bytes=student_bytes + (teacher_bytes if device.type == "cuda" else 0),
    )


def _student(
    config: TrainConfig, device: torch.device, specs: list[TeacherSpec], clips_per_step: int
) -> tuple[StudentEstimate, int]:
    """Everything of a step but targets from outside, and the most memory that it took, in bytes."""
    _held_bytes(device)
    objective, checkpoint_config = new_objective(config, specs)
    objective.to(device)
    set_up(objective, config.compute, device)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    worker = Worker(rank=0, world_size=1, device=device)
    groups = range(min(MAX_GROUPS, len(group_idx(config.batch_size, 0, max(config.most_workers, 1)))))
    masks = {number: _masks(config, number, groups) for number in range(1, 1 + NUM_WARM_UP + NUM_TIMED)}
    clips = random_clips(config, sum(group.size for group in masks[1]))
    targets = [_random_targets(config, spec, len(clips.good)) for spec in specs]
    optimizer_s = _time_optimizer(optimizer, device)

    def step(number: int) -> None:
        scheduled = min(number, config.steps)
        set_schedule(optimizer, config.optim, step=scheduled, steps=config.steps)
        update(
            objective,
            optimizer,
            Batch(step=number, clips=clips, masks=masks[number]),
            targets,
            config,
            worker,
        )
        if isinstance(objective, VJepa):
            objective.move_target_encoder(step=scheduled, steps=config.steps)

    mean_s, timed = _time(step, device)
    mean_optimizer_s = float(np.mean(optimizer_s[-len(timed) :]))
    step_s = mean_optimizer_s + (mean_s - mean_optimizer_s) * clips_per_step / len(clips.good)
    flops = _flops(config, sum(checkpoint_config.predictor_out_width))
    of_timed = (
        replace(flops, kept=[KeptTokens.of(group) for number in timed for group in masks[number]]).exact.total
        / flops.num_clips
    )
    measured = StudentEstimate(
        step_s=step_s,
        optimizer_s=mean_optimizer_s,
        clips_per_s=clips_per_step / step_s,
        flops_per_s=of_timed * clips_per_step / step_s,
        six_n_d=flops.six_n_d.total,
        exact=flops.exact.total,
        timed_steps=len(timed),
        timed_clips_per_step=len(clips.good),
    )
    return measured, peak_bytes(device)


def _flops(config: TrainConfig, out_width: int) -> RunFlops:
    """The compute of the run, but for a teacher's that is not its own."""
    grid = token_grid(config.view, config.encoder)
    return RunFlops(
        objective=config.objective,
        encoder=config.encoder,
        predictor=config.predictor,
        out_width=out_width,
        teacher=config.encoder if isinstance(config, VJepaRun) else None,
        steps=config.steps,
        batch_size=config.batch_size,
        grid=grid,
        kept=kept_tokens(config.mask, grid, seed=config.seed, batch_size=config.batch_size),
    )


def _teachers(
    config: StudentRun, sources: list[TargetSource], device: torch.device, clips_per_step: int
) -> TeacherEstimate:
    """The targets from outside, of all teachers together."""
    own = iter(config.teacher_ckpt)
    parts = [
        _teacher(config, source, next(own) if source.name == "in-process" else None, device, clips_per_step)
        for source in sources
    ]
    if len(parts) == 1:
        return parts[0]
    step_s, exact = sum(part.step_s for part in parts), [part.exact for part in parts if part.exact]
    return TeacherEstimate(
        where=", ".join(part.where for part in parts),
        step_s=step_s,
        clips_per_s=clips_per_step / step_s if step_s else None,
        six_n_d=sum(part.six_n_d for part in parts),
        exact=sum(exact) if len(exact) == len(parts) else None,
    )


def _teacher(
    config: StudentRun, source: TargetSource, ckpt: str | None, device: torch.device, clips_per_step: int
) -> TeacherEstimate:
    """The targets of one teacher; in this process, from ``ckpt``, as a step gets them: forward, rounding, and
    back to the host."""
    num_clips = config.steps * config.batch_size
    spec = source.spec
    six_n_d = FORWARD_FLOPS * spec.num_parameters * spec.num_tokens * num_clips
    if ckpt is None:
        return TeacherEstimate(where=source.name, six_n_d=six_n_d)
    clips = random_clips(config, config.teacher.batch_size)
    mean_s, _ = _time(lambda _: source.request(clips).result(), device)
    clip_s = mean_s / len(clips.good)
    encoder = teacher_architecture(ckpt)
    flops = None if encoder is None else encoder_forward(encoder, spec.num_tokens).total
    return TeacherEstimate(
        where=source.name,
        step_s=clips_per_step * clip_s,
        clips_per_s=1 / clip_s,
        flops_per_s=None if flops is None else flops / clip_s,
        six_n_d=six_n_d,
        exact=None if flops is None else flops * num_clips,
    )


def _masks(config: TrainConfig, step: int, groups: range) -> list[MaskGroup]:
    grid = token_grid(config.view, config.encoder)
    return [
        mask_group(config.mask, grid, seed=config.seed, step=step, group=group, batch_size=config.batch_size)
        for group in groups
    ]


def random_clips(config: TrainConfig, number: int) -> ClipBatch:
    pixels = np.random.default_rng(config.seed).integers(
        0, 256, (number, *config.view.clip_shape), dtype=np.uint8
    )
    return ClipBatch(
        pixels=pixels,
        digests=tuple(map(clip_digest, pixels)),
        keys=tuple(f"random/{row}" for row in range(number)),
        views=(0,) * number,
        good=np.ones(number, dtype=bool),
    )


def _random_targets(config: TrainConfig, spec: TeacherSpec, num_clips: int) -> torch.Tensor:
    """Packed targets, as a source gives them."""
    assert isinstance(config, StudentRun), "only it has targets from outside"
    return codec.pack(torch.randn(num_clips, spec.num_tokens, spec.width), config.target_dtype)


def _time(step: Callable[[int], object], device: torch.device) -> tuple[float, list[int]]:
    """Mean seconds of a step, and the numbers of those that were timed; the first one is 1."""
    started = time.perf_counter()
    for number in range(1, 1 + NUM_WARM_UP):
        step(number)
        if time.perf_counter() - started > MAX_TIMED_S / NUM_TIMED:
            break
    seconds: list[float] = []
    first = 1 + NUM_WARM_UP
    while len(seconds) < NUM_TIMED and sum(seconds) < MAX_TIMED_S:
        wait_for(device)
        begun = time.perf_counter()
        step(first + len(seconds))
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
    return float(np.mean(seconds)), list(range(first, first + len(seconds)))


def _time_optimizer(optimizer: torch.optim.Optimizer, device: torch.device) -> list[float]:
    """Grows by the seconds of each of the optimizer's steps: it is taken once, however many mask groups a
    step has."""
    seconds: list[float] = []

    def before(*_: object) -> None:
        wait_for(device)
        seconds.append(-time.perf_counter())

    def after(*_: object) -> None:
        wait_for(device)
        seconds[-1] += time.perf_counter()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return seconds


def _held_bytes(device: torch.device) -> int:
    """What tensors hold on a GPU now; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    """Most that tensors held on a GPU since ``_held_bytes``; on a CPU, most that this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
