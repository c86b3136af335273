"""`salt-train ... --estimate`: what a run takes in time, FLOPs and memory, from 20 steps on random clips (as
arXiv:2509.24317, Table 11)."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from salt_distill.common.clip import ClipBatch, clip_digest
from salt_distill.common.config import StudentRun, TrainConfig, VJepaRun
from salt_distill.common.model.compute import set_up, uses_bfloat16, wait_for
from salt_distill.common.model.flops import FORWARD_FLOPS, KeptTokens, encoder_forward, kept_tokens
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import MaskGroup, group_idx, mask_group
from salt_distill.common.model.teacher import TeacherSpec, device_kind
from salt_distill.common.targets import codec
from salt_distill.student_trainer import gpu_estimate
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.loop import Worker, update
from salt_distill.student_trainer.objective import new_objective
from salt_distill.student_trainer.optim import new_optimizer, set_schedule
from salt_distill.student_trainer.run_flops import NAMES, RunFlops, scientific, teacher_architecture
from salt_distill.student_trainer.targets.source import TargetSource, open_source
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
    if config.most_workers > 0 and config.gpus_per_worker == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as Ray does for such a worker
    found = estimate(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if config.estimate_out is not None:
        Path(config.estimate_out).write_text(json.dumps(found, indent=2) + "\n")
    _print(found)


def estimate(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Seconds, FLOPs and bytes of the whole run.

    ``student`` and ``teacher`` hold the time of one worker, the one with the most clips, and the FLOPs of all
    workers (``six_n_d`` and ``exact``; null where a teacher's architecture is not known here). A teacher that
    is served or cached takes no time here.
    """
    torch.set_num_threads(config.num_threads)
    num_workers = max(config.most_workers, 1)
    ranks = [
        _masks(config, 1, group_idx(config.batch_size, rank, num_workers)) for rank in range(num_workers)
    ]
    num_clips = max(sum(group.size for group in groups) for groups in ranks)
    spec, teacher, teacher_bytes = None, None, 0
    if isinstance(config, StudentRun):
        with closing(open_source(config, run="estimate")) as source:
            spec, held = source.spec, _held_bytes(device)
            teacher = _teacher(config, source, device, num_clips)
            teacher_bytes = peak_bytes(device) - held
            student = _student(
                config, device, spec, num_clips
            )  # inside, so that the teacher's weights count among what is held
    else:
        student = _student(config, device, None, num_clips)
    parts = [student] if teacher is None else [student, teacher]
    exact = [part["exact"] for part in parts]
    step_s = sum(part["step_s"] for part in parts)
    return {
        "objective": config.objective,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "workers": num_workers,
        "clips_per_worker": num_clips,
        "device": device_kind(device),
        "num_threads": config.num_threads,
        "dtype": "bfloat16" if uses_bfloat16(config.compute.dtype, device) else "float32",
        "student": student,
        "teacher": teacher,
        "step_s": step_s,
        "run_s": config.steps * step_s,
        "worker_s": num_workers * config.steps * step_s,
        "six_n_d": sum(part["six_n_d"] for part in parts),
        "exact": None if None in exact else sum(exact),
        "peak_memory_bytes": student.pop("peak_bytes") + (teacher_bytes if device.type == "cuda" else 0),
    }


def _student(
    config: TrainConfig, device: torch.device, spec: TeacherSpec | None, clips_per_step: int
) -> dict[str, Any]:
    """Everything of a step but targets from outside."""
    _held_bytes(device)
    objective, checkpoint_config = new_objective(config, spec)
    objective.to(device)
    set_up(objective, config.compute, device)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    worker = Worker(rank=0, world_size=1, device=device)
    groups = range(min(MAX_GROUPS, len(group_idx(config.batch_size, 0, max(config.most_workers, 1)))))
    masks = {number: _masks(config, number, groups) for number in range(1, 1 + NUM_WARM_UP + NUM_TIMED)}
    clips = random_clips(config, sum(group.size for group in masks[1]))
    target = None if spec is None else _random_targets(config, spec, len(clips.good))
    optimizer_s = _time_optimizer(optimizer, device)

    def step(number: int) -> None:
        scheduled = min(number, config.steps)
        set_schedule(optimizer, config.optim, step=scheduled, steps=config.steps)
        update(
            objective,
            optimizer,
            Batch(step=number, clips=clips, masks=masks[number], target=None),
            target,
            config,
            worker,
        )
        if isinstance(objective, VJepa):
            objective.move_target_encoder(step=scheduled, steps=config.steps)

    mean_s, timed = _time(step, device)
    mean_optimizer_s = float(np.mean(optimizer_s[-len(timed) :]))
    step_s = mean_optimizer_s + (mean_s - mean_optimizer_s) * clips_per_step / len(clips.good)
    grid = token_grid(config.view, config.encoder)
    flops = RunFlops(
        objective=config.objective,
        encoder=config.encoder,
        predictor=config.predictor,
        out_width=checkpoint_config.predictor_out_width,
        teacher=config.encoder if isinstance(config, VJepaRun) else None,
        steps=config.steps,
        batch_size=config.batch_size,
        grid=grid,
        kept=kept_tokens(config.mask, grid, seed=config.seed, batch_size=config.batch_size),
    )
    of_timed = (
        replace(flops, kept=[KeptTokens.of(group) for number in timed for group in masks[number]]).exact.total
        / flops.num_clips
    )
    return {
        "step_s": step_s,
        "optimizer_s": mean_optimizer_s,
        "clips_per_s": clips_per_step / step_s,
        "flops_per_s": of_timed * clips_per_step / step_s,
        "six_n_d": flops.six_n_d.total,
        "exact": flops.exact.total,
        "timed_steps": len(timed),
        "timed_clips_per_step": len(clips.good),
        "peak_bytes": peak_bytes(device),
    }


def _teacher(
    config: StudentRun, source: TargetSource, device: torch.device, clips_per_step: int
) -> dict[str, Any]:
    """The targets from outside; in this process as a step gets them: forward, rounding, and back to the
    host."""
    num_clips = config.steps * config.batch_size
    spec = source.spec
    six_n_d = FORWARD_FLOPS * spec.num_parameters * spec.num_tokens * num_clips
    found = {
        "where": source.name,
        "step_s": 0.0,
        "clips_per_s": None,
        "flops_per_s": None,
        "six_n_d": six_n_d,
        "exact": None,
    }
    if config.teacher_ckpt is None:
        return found
    clips = random_clips(config, config.teacher.batch_size)
    mean_s, _ = _time(lambda _: source.request(clips).result(), device)
    clip_s = mean_s / len(clips.good)
    encoder = teacher_architecture(config.teacher_ckpt)
    flops = None if encoder is None else encoder_forward(encoder, spec.num_tokens).total
    return found | {
        "step_s": clips_per_step * clip_s,
        "clips_per_s": 1 / clip_s,
        "flops_per_s": None if flops is None else flops / clip_s,
        "exact": None if flops is None else flops * num_clips,
    }


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


def _print(found: dict[str, Any]) -> None:
    student, teacher = found["student"], found["teacher"]
    rows = [(NAMES[found["objective"]], student)] + (
        [(f"teacher, {teacher['where']}", teacher)] if teacher else []
    )
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "step", "clips/s", "whole run", "FLOPs, 6ND", "FLOPs, exact", "FLOP/s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, part in rows:
        here = part["step_s"] > 0
        table.add_row(
            name,
            duration(part["step_s"]) if here else "elsewhere",
            f"{part['clips_per_s']:,.1f}" if here else "",
            duration(part["step_s"] * found["steps"]) if here else "",
            scientific(part["six_n_d"]),
            "" if part["exact"] is None else scientific(part["exact"]),
            "" if part["flops_per_s"] is None else scientific(part["flops_per_s"]),
        )
    if teacher is not None:
        exact = "" if found["exact"] is None else scientific(found["exact"])
        rate = f"{found['clips_per_worker'] / found['step_s']:,.1f}"
        table.add_row(
            "together",
            duration(found["step_s"]),
            rate,
            duration(found["run_s"]),
            scientific(found["six_n_d"]),
            exact,
        )
    console = Console()
    console.width = max(console.width, 110)  # a wide table is read by scrolling, not cut off
    console.print(table)
    for sentence in _explained(found):
        console.print(sentence, highlight=False, soft_wrap=True)


def _explained(found: dict[str, Any]) -> list[str]:
    student, num_clips = found["student"], found["clips_per_worker"]
    sentences = [
        (
            f"{found['steps']:,} steps of {found['batch_size']:,} clips, {num_clips:,} of them on a worker:"
            f" {duration(found['run_s'])}; {found['worker_s'] / 3600:,.2f} hours of all workers"
            f" ({found['workers']}). Peak memory of a worker: {found['peak_memory_bytes'] / 1e9:.2f} GB."
        ),
        (
            f"Times and clips/s are one worker's, FLOPs the whole run's. Timed on {found['device']},"
            f" {found['dtype']}: {student['timed_steps']} steps of {student['timed_clips_per_step']} random"
            " clips, with the run's masks."
        ),
        "Not in it: reading, decoding, what workers exchange, and the held-out loss (--val-every).",
    ]
    if student["timed_clips_per_step"] != num_clips:
        sentences.append(
            "A worker's other mask groups are taken to cost what the timed ones do; the optimizer's step is"
            " counted once."
        )
    if found["teacher"] is not None and found["teacher"]["step_s"] > 0:
        sentences.append(
            "Student and teacher are added up: they share the device. Where a CPU has cores for both they"
            " overlap."
        )
    return sentences


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
