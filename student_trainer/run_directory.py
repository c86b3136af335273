"""A run on disk: configuration, metrics, summary, checkpoints."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from salt_distill.common.config import TrainConfig, dump_yaml, load_yaml
from salt_distill.common.model.checkpoint import POINTER, find_checkpoint
from salt_distill.common.model.compute import uses_bfloat16
from salt_distill.common.model.flops import num_parameters
from salt_distill.common.model.teacher import device_kind
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.objective import Objective
from salt_distill.student_trainer.storage import fetch_newer, stored_config
from salt_distill.student_trainer.targets.source import TargetSource

CLAIM_S = 30.0
"""How long a start waits for the run's last process to end, in seconds."""

FREE_ON_RESUME = {
    "resume",
    "estimate",
    "estimate_out",
    "gpu",
    "steps",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "max_failures",
    "address",
    "log_every",
    "metrics_port",
    "wandb",
    "keep_every",
    "storage",
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
    "compute.sharding",
    "compute.attention",
}
"""Keys that may differ between a run and its continuation, with all below them: they do not change what is
learned. A source of targets may move, but its teacher's fingerprint and compute are checked against the
checkpoint's."""


def open_run(config: TrainConfig) -> None:
    """Writes ``config.yaml``.

    Raises ValueError where ``out`` or ``storage`` holds another run and ``--resume`` is off, or where the
    continuation would learn something else.
    """
    out = Path(config.out)
    path = out / "config.yaml"
    stored = None if config.storage is None or path.exists() else stored_config(config.storage)
    started = path.exists() or stored is not None
    where = f"--out {out}" if path.exists() else f"--storage {config.storage}"
    if started and not config.resume:
        raise ValueError(
            f"got {where}, which holds a run already: add --resume to continue it, or choose another"
            " directory"
        )
    if config.resume and not started:
        raise ValueError(f"got --resume for {out}, which holds no run: leave --resume out to start one")
    if started:
        check_same(
            load_yaml(path) if stored is None else yaml.safe_load(stored), config.model_dump(mode="json"), out
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(config))


@contextmanager
def claimed(config: TrainConfig) -> Iterator[Path | None]:
    """The checkpoint that the run goes on from, None: its beginning. Every start asks for it, and no other
    process trains in ``out`` inside the block.

    Fetches it where ``storage`` has a newer one, for workers that start on another machine, and cuts
    ``metrics.jsonl`` after it: what follows is trained again. Raises ValueError where another process stays:
    after a kill the workers of the killed command end by themselves, but not at once.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        deadline = time.monotonic() + CLAIM_S
        while not _lock(file):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"got {out}, in which another process trains since {CLAIM_S:g} s: end it, or choose"
                    " another directory"
                )
            time.sleep(0.1)
        if not (out / "config.yaml").exists():  # the command was given on another machine
            (out / "config.yaml").write_text(dump_yaml(config))
        if config.storage is not None:
            fetch_newer(config.storage, out)
        checkpoint = find_checkpoint(out) if (out / POINTER).exists() else None
        _cut_metrics(
            out / "metrics.jsonl", 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        )
        yield checkpoint


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        return False
    return True


def check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raises ValueError where a run was started with other values of what decides what it learns."""
    then = dict(_values(before))
    for key, value in _values(now):
        if then.get(key) != value:
            raise ValueError(
                f"--resume: {out} was started with {key}={then.get(key)!r}, got {key}={value!r}: use the same"
                " value, or start a new run"
            )


def _values(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that must not change, as ``--set`` names them, and their values."""
    for name, value in config.items():
        key = above + name
        if key not in FREE_ON_RESUME:
            yield from _values(value, f"{key}.") if isinstance(value, dict) else [(key, value)]


def _cut_metrics(path: Path, step: int) -> None:
    """Ends the file after the line of ``step``, in place: whoever follows it finds it shorter."""
    if path.exists():
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        os.truncate(path, sum(map(len, kept)))


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # the last line of a killed run may be cut off
        return float("inf")


def _git_commit() -> str | None:
    """Of this code; None where it is no checkout, or there is no git, as in an image."""
    if shutil.which("git") is None:
        return None
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or None


def write_environment(
    out: Path,
    config: TrainConfig,
    device: torch.device,
    decoder: str,
    *,
    world_size: int,
    after_step: int,
    peak_flops_per_s: float,
) -> None:
    """Adds to ``environment.json`` on what the run computes from here on: a list, since a run that is resumed
    may have moved."""
    path = out / "environment.json"
    environment = {
        "after_step": after_step,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "git_commit": _git_commit(),
        "world_size": world_size,
        "device": device_kind(device),
        "peak_flops_per_s": peak_flops_per_s,
        "num_threads": config.num_threads,
        **config.compute.model_dump(),
        "dtype": "bfloat16" if uses_bfloat16(config.compute.dtype, device) else "float32",
        "decoder": decoder,
    }
    before = json.loads(path.read_text()) if path.exists() else []
    write_whole(path, json.dumps([*before, environment], indent=2) + "\n")


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
        "teacher_wait_ms": (
            None if source is None else sum(line["teacher_wait_ms"] for line in lines) / len(lines)
        ),
        "data_wait_ms": sum(line["data_wait_ms"] for line in lines) / len(lines),
        "step_ms": sum(line["step_ms"] for line in lines) / len(lines),
        "num_parameters": {
            "encoder": num_parameters(objective.encoder),
            "predictor": num_parameters(objective.predictor),
        },
        "teacher": None if source is None else source.spec.to_json(),
        "target_source": None if source is None else source.counters(),
        "decoder": decoder,
        "reader": counters,
        "skipped": dict(sorted(skipped.items())),
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=2) + "\n")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    path = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
