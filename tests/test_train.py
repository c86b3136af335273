"""Training through the real commands: sources of targets agree to the bit, a killed run continues as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.local_ray import ray_to_join

STEPS = 52  # at 48 clips a step and 40 samples, every step crosses an epoch
SMALL = [
    "--preset", "nano", "--batch-size", "48", "--steps", str(STEPS), "--views", "2", "--log-every", "1",
    "--set", "encoder.width=24", "--set", "encoder.num_heads=2", "--set", "encoder.depth=2", "--set", "encoder.mlp_width=48",
    "--set", "predictor.width=24", "--set", "predictor.depth=1", "--set", "predictor.mlp_width=48", "--set", "optim.warmup_steps=5",
]  # fmt: skip


def salt(command: str, *arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a console script of this environment."""
    program = [str(Path(sys.executable).parent / command), *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, **environment}, timeout=240, check=False)
    assert not check or done.returncode == 0, f"{program}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "teacher"
    salt("salt-train", "teacher", "--data", shards, "--out", run, "--workers", 0, *SMALL)
    return run


@pytest.fixture(scope="module")
def targets(teacher, shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("targets") / "targets"
    salt("salt-serve", "precompute", "--ckpt", teacher, "--data", shards, "--views", 2, "--out", out, "--workers", 0)
    return out


@pytest.fixture(scope="module")
def teacher_url(teacher):
    program = [str(Path(sys.executable).parent / "salt-serve"), "teacher", "--ckpt", str(teacher), "--port", "0", "--cpus", "0.5"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_a_teacher_learns_and_its_run_explains_itself(teacher):
    of_run = losses(teacher)
    assert np.mean(of_run[-5:]) < np.mean(of_run[:5])
    assert json.loads((teacher / "summary.json").read_text())["loss_last"] == of_run[-1]
    assert {path.name for path in teacher.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "checkpoint",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_served_cached_and_in_process_targets_train_alike(workers, teacher, targets, teacher_url, shards, tmp_path):
    weights = (teacher / (teacher / "checkpoint").read_text().strip() / "model.safetensors").read_bytes()
    sources = {"served": ["--teacher-url", teacher_url], "cached": ["--targets", targets], "local": ["--teacher-ckpt", teacher]}
    runs = {}
    with ray_to_join(None) as ray_arguments:  # one Ray for the three, since starting it is most of the time
        for name, source in sources.items():
            out = runs[name] = tmp_path / name
            salt("salt-train", "student", *source, "--data", shards, "--out", out, "--workers", workers, "--cpus-per-worker", 0.5, *SMALL,
                 RAY_ADDRESS=ray_arguments["address"])  # fmt: skip
    served = losses(runs["served"])
    assert len(served) == STEPS
    assert served == losses(runs["cached"]) == losses(runs["local"])
    assert np.mean(served[-5:]) < np.mean(served[:5])
    assert (teacher / (teacher / "checkpoint").read_text().strip() / "model.safetensors").read_bytes() == weights


def test_world_size_does_not_change_the_loss(teacher, shards, tmp_path):
    for workers in (0, 2):
        salt("salt-train", "student", "--teacher-ckpt", teacher, "--data", shards, "--out", tmp_path / str(workers), "--workers", workers,
             "--cpus-per-worker", 0.5, *SMALL)  # fmt: skip
    alone, together = losses(tmp_path / "0"), losses(tmp_path / "2")
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-6)
    np.testing.assert_allclose(alone, together, rtol=1e-3)  # sums in another order drift apart as the run goes on


@pytest.mark.parametrize("objective", ["student", "vjepa"])
def test_kill_and_resume_equals_an_uninterrupted_run(objective, teacher, shards, tmp_path):
    source = {"student": ["--teacher-ckpt", teacher], "vjepa": ["--set", "ema.start=0.9"]}[objective]
    arguments = [objective, *source, "--data", shards, "--workers", 0, "--keep-every", 10, *SMALL]
    salt("salt-train", *arguments, "--out", tmp_path / "whole")
    killed = tmp_path / "killed"
    program = [str(Path(sys.executable).parent / "salt-train"), *map(str, arguments), "--out", str(killed)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (killed / "checkpoint").exists() or len((killed / "metrics.jsonl").read_text().splitlines()) < 13:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) < STEPS
    salt("salt-train", *arguments, "--out", killed, "--resume")
    assert losses(killed) == losses(tmp_path / "whole")
    whole, resumed = (run / "checkpoints" / f"step-{STEPS}" for run in (tmp_path / "whole", killed))
    files = {path.name for path in whole.glob("*.safetensors")}
    assert files == {"model.safetensors", "predictor.safetensors"} | ({"online.safetensors"} if objective == "vjepa" else set())
    assert [name for name in files if (whole / name).read_bytes() != (resumed / name).read_bytes()] == []


def test_wrong_continuations_are_refused_with_a_sentence(teacher, shards, tmp_path):
    again = salt("salt-train", "teacher", "--data", shards, "--out", teacher, "--workers", 0, *SMALL, check=False)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    other = salt("salt-train", "teacher", "--data", shards, "--out", teacher, "--workers", 0, "--resume", "--seed", 5, *SMALL, check=False)
    assert other.returncode == 1
    assert "seed=0" in other.stderr
    none = salt("salt-train", "student", "--data", shards, "--out", tmp_path / "x", *SMALL, check=False)
    assert none.returncode == 2
    assert "--teacher-url, --targets or --teacher-ckpt" in none.stderr
    grid = salt("salt-train", "student", "--teacher-ckpt", teacher, "--data", shards, "--out", tmp_path / "y", "--workers", 0, *SMALL,
                "--set", "encoder.patch_size=16", check=False)  # fmt: skip
    assert grid.returncode == 1
    assert "token grid" in grid.stderr


def test_a_worker_error_reaches_the_user_as_its_own_sentence(teacher, shards, tmp_path):
    failed = salt("salt-train", "student", "--teacher-ckpt", teacher, "--data", shards, "--out", tmp_path / "z", *SMALL,
                  "--set", "encoder.patch_size=16", check=False)  # fmt: skip
    assert failed.returncode == 1
    assert "token grid" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_checkpoints_load_strictly(teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    from common.model.checkpoint import find_checkpoint, load_encoder

    checkpoint = find_checkpoint(teacher)
    assert load_encoder(teacher)(torch.zeros(1, 3, 8, 32, 32)).shape == (1, 64, 24)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in checkpoint.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    tensors["norm.wrong"] = tensors.pop("norm.bias")
    save_file(tensors, damaged / "model.safetensors")
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = (damaged / "model.safetensors").stat().st_size
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"norm\.bias is missing.*norm\.wrong is not expected"):
        load_encoder(damaged)
    with pytest.raises(ValueError, match="no checkpoint has been written"):
        load_encoder(tmp_path)
