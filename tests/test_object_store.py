"""Shards, checkpoints and target caches in an object store: a whole student of a real S3 server, which fails and dawdles on request."""

import io
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rich.console
import torch
import yaml
from foreign_tools import random_clip, tokens
from moto_s3 import Store, moto_store
from train_tools import ALONE

from common.config import PrecomputeConfig, StudentRun, TeacherRun, TrainConfig, merge
from common.data.fetched import fetched
from common.model.checkpoint import read_config
from student_trainer.loop import train
from student_trainer.run_directory import open_run, read_metrics
from teacher_server.precompute import precompute

SMALL = {
    "steps": 3,
    "batch_size": 8,
    "views": 2,
    "log_every": 1,
    "encoder": {"width": 24, "depth": 1, "num_heads": 2, "mlp_width": 48, "patch_size": 8},
    "predictor": {"width": 12, "depth": 1, "num_heads": 1, "mlp_width": 24},
    "view": {"num_frames": 4, "frame_step": 1, "crop_size": 32},
    "optim": {"warmup_steps": 1},
}


@pytest.fixture(scope="module")
def moto():
    with moto_store() as store:
        yield store


@pytest.fixture
def store(moto: Store, tmp_path, monkeypatch) -> Store:
    """The server, reached by short addresses, and an empty folder for copies."""
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    moto.requests.clear()
    return moto


def run(kind: type[TrainConfig], shards: str | Path, out: Path, **values) -> list[float]:
    config = kind.model_validate(merge(SMALL, {"data": str(shards), "out": str(out)}, values))
    open_run(config)
    train(config, ALONE, None)
    return [line["loss"] for line in read_metrics(out)]


def gets(store: Store, part: str) -> int:
    return sum(request.startswith("GET") and part in request for request in store.requests)


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("object-store") / "teacher"
    run(TeacherRun, shards, out)
    return out


def test_a_student_takes_shards_and_teacher_from_a_store_that_fails_and_dawdles(store, shards, teacher, tmp_path):
    local = run(StudentRun, shards, tmp_path / "local", teacher_ckpt=str(teacher))
    addresses = store.put(shards, "toy"), store.put(teacher, "runs/teacher")
    store.faults, store.stalls = 5, 1
    streamed = run(StudentRun, addresses[0], tmp_path / "streamed", teacher_ckpt=addresses[1])
    assert (store.faults, store.stalls) == (0, 0)
    assert streamed == local
    assert gets(store, "training.pt") == 0  # twice the weights, and no teacher needs it
    assert not list(tmp_path.rglob("xdg/**/*.tar"))  # shards are read in parts, not copied
    again = run(StudentRun, addresses[0], tmp_path / "again", teacher_ckpt=addresses[1])
    assert again == local
    assert gets(store, "model.safetensors") == 1


def test_a_cache_in_a_store_gives_the_same_losses(store, shards, teacher, tmp_path):
    values = {"ckpt": str(teacher), "data": str(shards), "out": str(tmp_path / "targets"), "views": 2, "workers": 0}
    precompute(PrecomputeConfig.model_validate(values), rich.console.Console(file=io.StringIO()))
    address = store.put(tmp_path / "targets", "targets")
    store.faults = 3
    cached = run(StudentRun, shards, tmp_path / "cached", targets=address)
    assert cached == run(StudentRun, shards, tmp_path / "local", targets=str(tmp_path / "targets"))
    assert store.faults == 0


@pytest.mark.parametrize("form", ["ours", "as_hf", "as_pt"])
def test_every_kind_of_checkpoint_is_read_from_an_address(store, form, request):
    path = request.getfixturevalue(form)
    clip = random_clip(4, 32)
    assert torch.equal(tokens(store.put(path, f"others/{path.name}"), clip), tokens(path, clip))


def test_a_copy_that_was_interrupted_goes_on_and_what_changes_is_copied_anew(store, teacher):
    address = store.put(teacher, "runs/changing")
    copy = fetched(address)
    config = copy / "config.yaml"
    assert config.read_bytes() == (teacher / "config.yaml").read_bytes()
    config.unlink()
    store.requests.clear()
    assert fetched(address) == copy
    assert config.exists()
    assert gets(store, "salt/runs/changing/") == 1
    store.files.delete_file("salt/runs/changing/summary.json")
    assert not (fetched(address) / "summary.json").exists()
    assert (copy / "summary.json").exists()


def test_what_is_not_in_a_store_is_said(store, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "checkpoints" / "step-3" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"got s3://salt/nowhere, expected a folder or a file of an object store: nothing is there"):
        read_config("s3://salt/nowhere")
    with pytest.raises(ValueError, match="no checkpoint has been written there"):
        read_config(store.put(tmp_path / "unfinished", "runs/unfinished"))
    assert read_config(store.put(teacher, "runs/finished")) == read_config(teacher)


@pytest.mark.faults
def test_a_student_resumes_from_its_checkpoint_in_the_store_on_another_machine(store, shards, teacher, tmp_path):
    """The first machine dies with its disk; the store fails and dawdles while it is read."""
    addresses = store.put(shards, "toy"), store.put(teacher, "runs/teacher")
    values = merge(SMALL, {"data": addresses[0], "teacher_ckpt": addresses[1], "steps": 40, "keep_every": 5})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    program = [
        str(Path(sys.executable).parent / "salt-train"),
        "student",
        "--preset",
        "nano",
        "--config",
        str(tmp_path / "run.yaml"),
        "--workers",
        "0",
    ]
    subprocess.run([*program, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    program += ["--storage", "s3://salt/runs/student"]
    with subprocess.Popen([*program, "--out", str(tmp_path / "first")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not store.files.get_file_info("salt/runs/student/checkpoint").is_file:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    shutil.rmtree(tmp_path / "first")
    store.faults, store.stalls = 5, 1
    subprocess.run([*program, "--out", str(tmp_path / "second"), "--resume"], check=True, capture_output=True)
    assert (store.faults, store.stalls) == (0, 0)
    lines = read_metrics(tmp_path / "second")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_metrics(tmp_path / "whole")]
