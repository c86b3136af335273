"""The commands of training on a small data set: what their tests share."""

import json
import os
import subprocess
import sys
from pathlib import Path

STEPS = 52  # at 48 clips a step and 40 samples, every step crosses an epoch
SMALL = [
    "--preset", "nano", "--batch-size", "48", "--steps", str(STEPS), "--views", "2", "--log-every", "1",
    "--set", "encoder.width=24", "--set", "encoder.num_heads=2", "--set", "encoder.depth=2", "--set",
    "encoder.mlp_width=48",
    "--set", "predictor.width=24", "--set", "predictor.depth=1", "--set", "predictor.mlp_width=48", "--set",
    "optim.warmup_steps=5",
]  # fmt: skip


def salt(
    command: str, *arguments: object, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a console script of this environment."""
    program = [str(Path(sys.executable).parent / command), *map(str, arguments)]
    done = subprocess.run(
        program, capture_output=True, text=True, env={**os.environ, **environment}, timeout=240, check=False
    )
    assert not check or done.returncode == 0, f"{program}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def write_targets(teacher: Path, shards: Path, out: Path) -> Path:
    """A cache of two views."""
    of_teacher = ["--ckpt", teacher, "--data", shards, "--views", 2, "--workers", 0]
    salt("salt-serve", "precompute", *of_teacher, "--out", out)
    return out


def train_teacher(shards: Path, run: Path) -> Path:
    """A run of stage 1."""
    salt("salt-train", "teacher", "--data", shards, "--out", run, "--workers", 0, *SMALL)
    return run
