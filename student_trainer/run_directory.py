"""A run on disk: configuration, metrics, summary, checkpoints."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.config import TrainConfig, dump_yaml, load_yaml
from common.model.checkpoint import POINTER, find_checkpoint
from common.model.compute import uses_bfloat16
from common.model.flops import num_parameters
from common.model.teacher import device_kind
from student_trainer.objective import Objective
from student_trainer.target_source import TargetSource

FREE_ON_RESUME = {
    "resume",
    "estimate",
    "estimate_out",
    "steps",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "address",
    "log_every",
    "metrics_port",
    "wandb",
    "keep_every",
    "data",
    "out",
    "loader",
    "client",
    "teacher_url",
    "teacher_token_file",
    "teacher_ca",
    "targets",
    "teacher_ckpt",
    "on_teacher_loss",
    "masked_targets",
    "cache",
    "group",
    "compute.activation_checkpointing",
    "compute.compile",
    "compute.attention",
}
"""Keys that may differ between a run and its continuation, with all below them: they do not change what is learned. A source of targets may move,
but its teacher's fingerprint and compute are checked against the checkpoint's."""


def open_run(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, None for a new run; writes ``config.yaml``.

    Raises ValueError where ``out`` holds another run and ``--resume`` is off, or where the continuation would learn something else.
    """
    out = Path(config.out)
    started = (out / "config.yaml").exists()
    if started and not config.resume:
        raise ValueError(f"got --out {out}, which holds a run already: add --resume to continue it, or choose another directory")
    if config.resume and not started:
        raise ValueError(f"got --resume for {out}, which holds no run: leave --resume out to start one")
    if started:
        check_same(load_yaml(out / "config.yaml"), config.model_dump(mode="json"), out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_yaml(config))
    if not (out / POINTER).exists():
        return None
    checkpoint = find_checkpoint(out)
    _cut_metrics(out / "metrics.jsonl", int(checkpoint.name.removeprefix("step-")))
    return checkpoint


def check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raises ValueError where a run was started with other values of what decides what it learns."""
    then = dict(_values(before))
    for key, value in _values(now):
        if then.get(key) != value:
            raise ValueError(
                f"--resume: {out} was started with {key}={then.get(key)!r}, got {key}={value!r}: use the same value, or start a new run"
            )


def _values(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that must not change, as ``--set`` names them, and their values."""
    for name, value in config.items():
        key = above + name
        if key not in FREE_ON_RESUME:
            yield from _values(value, f"{key}.") if isinstance(value, dict) else [(key, value)]


def _cut_metrics(path: Path, step: int) -> None:
    """Drops the lines after a checkpoint's step: they are trained again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # the last line of a killed run may be cut off
        return float("inf")


def write_environment(
    out: Path, config: TrainConfig, device: torch.device, decoder: str, *, world_size: int, after_step: int, peak_flops_per_s: float
) -> None:
    """Adds to ``environment.json`` on what the run computes from here on: a list, since a run that is resumed may have moved."""
    path = out / "environment.json"
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    environment = {
        "after_step": after_step,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "git_commit": git.stdout.strip() or None,
        "world_size": world_size,
        "device": device_kind(device),
        "peak_flops_per_s": peak_flops_per_s,
        "num_threads": config.num_threads,
        **config.compute.model_dump(),
        "dtype": "bfloat16" if uses_bfloat16(config.compute.dtype, device) else "float32",
        "decoder": decoder,
    }
    before = json.loads(path.read_text()) if path.exists() else []
    partial = out / ".environment.json"
    partial.write_text(json.dumps([*before, environment], indent=2) + "\n")
    partial.replace(path)


def write_summary(
    out: Path,
    config: TrainConfig,
    objective: Objective,
    source: TargetSource | None,
    *,
    decoder: str,
    counters: dict[str, int],
    skipped: dict[str, str],
) -> None:
    """``summary.json``: what came of the run, from its metrics and its parts."""
    lines = read_metrics(out)
    summary = {
        "objective": config.objective,
        "source": None if source is None else source.name,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "flops": lines[-1]["flops"],
        "teacher_wait_ms": None if source is None else sum(line["teacher_wait_ms"] for line in lines) / len(lines),
        "data_wait_ms": sum(line["data_wait_ms"] for line in lines) / len(lines),
        "step_ms": sum(line["step_ms"] for line in lines) / len(lines),
        "num_parameters": {"encoder": num_parameters(objective.encoder), "predictor": num_parameters(objective.predictor)},
        "teacher": None if source is None else source.spec.to_json(),
        "target_source": None if source is None else source.counters(),
        "decoder": decoder,
        "reader": counters,
        "skipped": dict(sorted(skipped.items())),
    }
    partial = out / ".summary.json"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    partial.replace(out / "summary.json")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    path = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
