"""Training through the real commands: sources of targets agree to the bit, alone and with workers of Ray."""

import hashlib
import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import SMALL, STEPS, losses, salt, train_teacher, write_targets

from salt_distill.common.local_ray import ray_to_join


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory) -> Path:
    return train_teacher(shards, tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def targets(teacher, shards, tmp_path_factory) -> Path:
    return write_targets(teacher, shards, tmp_path_factory.mktemp("targets") / "targets")


@pytest.fixture(scope="module")
def teacher_url(teacher):
    program = [
        str(Path(sys.executable).parent / "salt-serve"),
        "teacher",
        "--ckpt",
        str(teacher),
        "--port",
        "0",
        "--cpus",
        "0.5",
    ]
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


@pytest.mark.parametrize(
    "workers", [0, *(pytest.param(workers, marks=pytest.mark.slow) for workers in (1, 2))]
)
def test_served_cached_and_in_process_targets_train_alike(
    workers, teacher, targets, teacher_url, shards, tmp_path
):
    weights = (teacher / (teacher / "checkpoint").read_text().strip() / "model.safetensors").read_bytes()
    sources = {
        "served": ["--teacher-url", teacher_url],
        "cached": ["--targets", targets],
        "local": ["--teacher-ckpt", teacher],
    }
    runs = {}
    # One Ray for the three, since starting it is most of the time
    with ray_to_join(None) if workers else nullcontext({"address": ""}) as ray_arguments:
        for name, source in sources.items():
            out = runs[name] = tmp_path / name
            salt("salt-train", "student", *source, "--data", shards, "--out", out, "--workers", workers,
            "--cpus-per-worker", 0.5, *SMALL,
                 RAY_ADDRESS=ray_arguments["address"])  # fmt: skip
    served = losses(runs["served"])
    assert len(served) == STEPS
    assert served == losses(runs["cached"]) == losses(runs["local"])
    assert np.mean(served[-5:]) < np.mean(served[:5])
    assert (
        teacher / (teacher / "checkpoint").read_text().strip() / "model.safetensors"
    ).read_bytes() == weights


@pytest.mark.slow
def test_world_size_does_not_change_the_loss(teacher, shards, tmp_path):
    for workers in (0, 2):
        salt("salt-train", "student", "--teacher-ckpt", teacher, "--data", shards, "--out",
        tmp_path / str(workers), "--workers", workers,
             "--cpus-per-worker", 0.5, *SMALL)  # fmt: skip
    alone, together = losses(tmp_path / "0"), losses(tmp_path / "2")
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-6)
    np.testing.assert_allclose(
        alone, together, rtol=1e-3
    )  # sums in another order drift apart as the run goes on


@pytest.mark.slow
def test_a_worker_error_reaches_the_user_as_its_own_sentence(teacher, shards, tmp_path):
    failed = salt("salt-train", "student", "--teacher-ckpt", teacher, "--data", shards, "--out",
    tmp_path / "z", *SMALL,
                  "--set", "encoder.patch_size=16", check=False)  # fmt: skip
    assert failed.returncode == 1
    assert "token grid" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_checkpoints_load_strictly(teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    from salt_distill.common.model.checkpoint import find_checkpoint, load_encoder

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
    stored = (damaged / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {
        "bytes": len(stored),
        "sha256": hashlib.sha256(stored).hexdigest(),
    }
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"norm\.bias is missing.*norm\.wrong is not expected"):
        load_encoder(damaged)
    with pytest.raises(ValueError, match="no checkpoint has been written"):
        load_encoder(tmp_path)
