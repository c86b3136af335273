"""A killed run continues as if it had not been, and one that would learn something else is refused."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_tools import SMALL, STEPS, losses, salt, train_teacher


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory) -> Path:
    return train_teacher(shards, tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["student", "vjepa"])
def test_kill_and_resume_equals_an_uninterrupted_run(objective, teacher, shards, tmp_path):
    source = {"student": ["--teacher-ckpt", teacher], "vjepa": ["--set", "ema.start=0.9"]}[objective]
    arguments = [objective, *source, "--data", shards, "--workers", 0, "--keep-every", 10, *SMALL]
    salt("salt-train", *arguments, "--out", tmp_path / "whole")
    killed = tmp_path / "killed"
    program = [str(Path(sys.executable).parent / "salt-train"), *map(str, arguments), "--out", str(killed)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while (
            not (killed / "checkpoint").exists()
            or len((killed / "metrics.jsonl").read_text().splitlines()) < 13
        ):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) < STEPS
    salt("salt-train", *arguments, "--out", killed, "--resume")
    assert losses(killed) == losses(tmp_path / "whole")
    whole, resumed = (run / "checkpoints" / f"step-{STEPS}" for run in (tmp_path / "whole", killed))
    files = {path.name for path in whole.glob("*.safetensors")}
    assert files == {"model.safetensors", "predictor.safetensors"} | (
        {"online.safetensors"} if objective == "vjepa" else set()
    )
    assert [name for name in files if (whole / name).read_bytes() != (resumed / name).read_bytes()] == []


@pytest.mark.slow
def test_wrong_continuations_are_refused_with_a_sentence(teacher, shards, tmp_path):
    again = salt(
        "salt-train", "teacher", "--data", shards, "--out", teacher, "--workers", 0, *SMALL, check=False
    )
    assert again.returncode == 1
    assert "--resume" in again.stderr
    other = salt(
        "salt-train",
        "teacher",
        "--data",
        shards,
        "--out",
        teacher,
        "--workers",
        0,
        "--resume",
        "--seed",
        5,
        *SMALL,
        check=False,
    )
    assert other.returncode == 1
    assert "seed=0" in other.stderr
    none = salt("salt-train", "student", "--data", shards, "--out", tmp_path / "x", *SMALL, check=False)
    assert none.returncode == 2
    assert "--teacher-url, --targets or --teacher-ckpt" in none.stderr
    grid = salt("salt-train", "student", "--teacher-ckpt", teacher, "--data", shards, "--out",
    tmp_path / "y", "--workers", 0, *SMALL,
                "--set", "encoder.patch_size=16", check=False)  # fmt: skip
    assert grid.returncode == 1
    assert "token grid" in grid.stderr
