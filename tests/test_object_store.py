"""Shards, checkpoints and target caches in an object store: a whole student of a real S3 server, which fails
and dawdles on request."""

import io
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs as fs
import pytest
import rich.console
import torch
import yaml
from foreign_tools import random_clip, tokens
from moto_s3 import Store, moto_store
from train_tools import train

from salt_distill.common.config import (
    CacheGcConfig,
    CacheStatsConfig,
    CacheVerifyConfig,
    PrecomputeConfig,
    StudentRun,
    TeacherRun,
    TrainConfig,
    merge,
)
from salt_distill.common.folders.fetched import fetched
from salt_distill.common.model.checkpoint import read_config
from salt_distill.common.targets.cache_file import CacheFile
from salt_distill.common.targets.codec import CorruptTargetError
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.student_trainer.run_directory import read_metrics
from salt_distill.teacher_server.cache.commands import collect_garbage, show_stats, verify
from salt_distill.teacher_server.precompute import precompute

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
    train(config)
    return [line["loss"] for line in read_metrics(out)]


def gets(store: Store, part: str) -> int:
    return sum(request.startswith("GET") and part in request for request in store.requests)


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("object-store") / "teacher"
    run(TeacherRun, shards, out)
    return out


@pytest.fixture(scope="module")
def targets(shards, teacher, tmp_path_factory) -> Path:
    """A cache on disk; read only."""
    out = tmp_path_factory.mktemp("object-store") / "targets"
    written(shards, teacher, out)
    return out


def written(shards: Path, teacher: Path, out: str | Path, **values) -> str:
    """Writes a target cache; what the command said."""
    console = rich.console.Console(file=io.StringIO(), width=1000)
    given = {"ckpt": str(teacher), "data": str(shards), "out": str(out), "views": 2, "workers": 0, **values}
    precompute(PrecomputeConfig.model_validate(given), console)
    return console.file.getvalue()


def on_disk(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def in_store(store: Store, folder: str) -> dict[str, bytes]:
    found = store.files.get_file_info(fs.FileSelector(f"salt/{folder}", recursive=True, allow_not_found=True))
    return {
        info.path.removeprefix(f"salt/{folder}/"): store.files.open_input_file(info.path).read()
        for info in found
        if info.is_file
    }


def test_a_student_takes_shards_and_teacher_from_a_store_that_fails_and_dawdles(
    store, shards, teacher, tmp_path
):
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


def test_a_cache_in_a_store_gives_the_same_losses(store, shards, teacher, targets, tmp_path):
    address = store.put(targets, "targets")
    store.faults = 3
    cached = run(StudentRun, shards, tmp_path / "cached", targets=address)
    assert cached == run(StudentRun, shards, tmp_path / "local", targets=str(targets))
    assert store.faults == 0


def test_targets_are_written_to_a_store_that_fails_and_dawdles(store, shards, teacher, targets, tmp_path):
    store.faults, store.stalls = 5, 1
    assert "targets to come" in written(shards, teacher, "s3://salt/made")
    assert (store.faults, store.stalls) == (0, 0)
    assert in_store(store, "made") == on_disk(targets)
    assert not list((tmp_path / "xdg" / "salt").rglob("*.arrow"))
    store.requests.clear()
    assert "targets are there, and are checked" in written(shards, teacher, "s3://salt/made")
    assert not [
        request
        for request in store.requests
        if not request.startswith(("GET", "HEAD")) and "manifest" not in request
    ]
    with pytest.raises(
        ValueError,
        match=r"s3://salt/made: got a cache with data_seed=0, expected 1: precompute into an empty folder",
    ):
        written(shards, teacher, "s3://salt/made", data_seed=1)


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_in_the_store(store, shards, teacher, targets, tmp_path):
    program = [
        str(Path(sys.executable).parent / "salt-serve"),
        "precompute",
        "--ckpt",
        str(teacher),
        "--data",
        str(shards),
    ]
    program += ["--out", "s3://salt/killed", "--views", "2", "--workers", "0"]
    with subprocess.Popen(program, stderr=subprocess.DEVNULL) as process:
        while not (done := in_store(store, "killed")):
            assert process.poll() is None
        process.kill()
    assert "manifest.json" not in in_store(store, "killed")
    left = tmp_path / "xdg" / "salt" / "making" / "left"  # as of a process that was killed amid a file
    left.mkdir(parents=True)
    (left / "file.arrow").write_bytes(b"0" * 1000)
    store.requests.clear()
    assert re.search(
        r"\d+ targets to come, \d+ more are there: ", written(shards, teacher, "s3://salt/killed")
    )
    assert in_store(store, "killed") == on_disk(targets)
    assert not [
        request
        for request in store.requests
        for name in done
        if request.startswith(("PUT", "POST")) and name in request
    ]
    assert not list(left.parent.iterdir())


def test_damage_in_a_store_is_named_and_the_same_command_puts_it_right(store, shards, teacher, targets):
    address, whole = store.put(targets, "damaged"), on_disk(targets)
    first, second, third = sorted(name for name in whole if name.endswith(".arrow"))[:3]
    row, other = (CacheFile(targets / name, TargetCache(targets).spec).row(3) for name in (first, second))
    flipped = (
        whole[first].index(bytes(row.encoded.target)),
        whole[second].index((other.key or "").encode()),
        len(whole[third]) - 40,
    )
    for name, position in zip((first, second, third), flipped, strict=True):
        data = bytearray(whole[name])
        data[position] ^= 1
        with store.files.open_output_stream(f"salt/damaged/{name}") as file:
            file.write(bytes(data))
    with pytest.raises(
        CorruptTargetError,
        match="s3://salt/damaged: 3 of its files are damaged: repeat its `salt-serve precompute`",
    ):
        checked(address)
    said = written(shards, teacher, address)
    assert (
        f"s3://salt/damaged/{first}, row 3, sample {row.key}, view {row.view}: got a target with checksum"
        in said
    )
    assert re.search(rf"s3://salt/damaged/{second}: got \d+ rows with sha256", said)
    assert f"s3://salt/damaged/{third}: got no readable cache file" in said
    assert in_store(store, "damaged") == whole
    assert checked(address) == "s3://salt/damaged: nothing is damaged\n"
    store.files.delete_file(f"salt/damaged/{first}")
    with pytest.raises(CorruptTargetError, match="1 of its files are damaged"):
        checked(address)


def checked(address: str, **values) -> str:
    console = rich.console.Console(file=io.StringIO(), width=1000)
    verify(CacheVerifyConfig.model_validate({"targets": address, **values}), console)
    return console.file.getvalue()


def test_what_a_cache_in_a_store_holds_and_what_is_not_done_there(store, targets, capsys):
    address = store.put(targets, "shown")
    for place in (address, str(targets)):
        show_stats(CacheStatsConfig(targets=place, json_=True))
    in_the_store, here = capsys.readouterr().out.split("}\n{")
    assert in_the_store.strip("{}\n") == here.strip("{}\n")
    with pytest.raises(
        ValueError,
        match=r"got --repair with s3://salt/shown, .* repeat the `salt-serve precompute` that made it",
    ):
        checked(address, repair=True)
    with pytest.raises(
        ValueError,
        match=r"got s3://salt/shown, expected a folder of this machine: nothing is written through",
    ):
        collect_garbage(CacheGcConfig(targets=address), rich.console.Console())
    with pytest.raises(ValueError, match=r"got s3://salt/nowhere, expected the folder of a target cache"):
        checked("s3://salt/nowhere")
    store.files.delete_file("salt/shown/manifest.json")
    with pytest.raises(
        ValueError, match=r"got s3://salt/shown, expected a target cache with a manifest.json"
    ):
        checked(address)


def test_a_disk_without_room_for_a_file_and_a_store_that_is_gone_are_said(
    store, shards, teacher, monkeypatch
):
    used = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used._replace(free=3000))
    with pytest.raises(
        ValueError,
        match=(
            r"got 3.0 kB free on \S+ under .*/xdg/salt, expected \S+ kB for 1 files at a time on their way to"
            r" s3://salt/gone"
        ),
    ):
        written(shards, teacher, "s3://salt/gone")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used)
    monkeypatch.setattr("salt_distill.common.folders.folder.RETRY_BUDGET_S", 0.3)
    store.faults = 10**6
    with pytest.raises(
        ConnectionError,
        match=r"s3://salt/gone: its files could not be listed: .* put that right, and repeat the command",
    ):
        written(shards, teacher, "s3://salt/gone")
    store.faults = 0
    with pytest.raises(
        ConnectionError, match=r"s3://none/x: \S+\.arrow could not be written: .*NO_SUCH_BUCKET"
    ):
        written(shards, teacher, "s3://none/x")


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
    with pytest.raises(
        ValueError,
        match=r"got s3://salt/nowhere, expected a folder or a file of an object store: nothing is there",
    ):
        read_config("s3://salt/nowhere")
    with pytest.raises(ValueError, match="no checkpoint has been written there"):
        read_config(store.put(tmp_path / "unfinished", "runs/unfinished"))
    assert read_config(store.put(teacher, "runs/finished")) == read_config(teacher)


@pytest.mark.faults
def test_several_actors_write_to_a_store_that_fails_and_dawdles(store, shards, teacher, targets, tmp_path):
    program = [
        str(Path(sys.executable).parent / "salt-serve"),
        "precompute",
        "--ckpt",
        str(teacher),
        "--data",
        str(shards),
        "--views",
        "2",
    ]
    program += ["--workers", "2", "--cpus-per-worker", "0.5", "--out", "s3://salt/actors"]
    store.faults, store.stalls = 5, 1
    subprocess.run(program, check=True, capture_output=True)
    assert (store.faults, store.stalls) == (0, 0)
    assert in_store(store, "actors") == on_disk(targets)
    assert not list((tmp_path / "xdg" / "salt" / "making").iterdir())


@pytest.mark.faults
def test_a_student_resumes_from_its_checkpoint_in_the_store_on_another_machine(
    store, shards, teacher, tmp_path
):
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
    with subprocess.Popen(
        [*program, "--out", str(tmp_path / "first")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
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
