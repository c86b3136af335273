"""Targets on disk: what a cache holds, resume, and students that read it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import av
import numpy as np
import pytest
import rich.console
import torch
from teacher_tools import BATCH_SIZE, VIEW, save_teacher

from salt_distill.common.config import LoaderConfig, PrecomputeConfig, StudentRun, TeacherComputeConfig
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.views import VIEW_VERSION
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.source import views_of
from salt_distill.student_trainer.targets.stored_targets import StoredTargets
from salt_distill.teacher_server.precompute import precompute

SHARDS, SAMPLES = 2, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two shards of small videos, as others would pack them."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"moving-{shard:06d}.tar", "w") as tar:
            for number in range(SAMPLES):
                frames = [
                    av.VideoFrame.from_ndarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                    for _ in range(6)
                ]
                video = encode_mp4(frames, width=32, height=24, fps=10, crf=30)
                member = tarfile.TarInfo(f"{shard}{number:03d}.mp4")
                member.size = len(video)
                tar.addfile(member, io.BytesIO(video))
    open_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("ckpt") / "teacher")


def config_of(data, ckpt, out, **changes):
    values = {
        "views": 2,
        "workers": 0,
        "data_seed": 5,
        "teacher": TeacherComputeConfig(batch_size=BATCH_SIZE),
        **changes,
    }
    return PrecomputeConfig(ckpt=str(ckpt), data=str(data), out=str(out), **values)


def run(*args, **kwargs):
    """The command in this process; what it printed."""
    console = rich.console.Console(file=io.StringIO(), width=400)
    precompute(config_of(*args, **kwargs), console)
    return console.file.getvalue()


def reader_of(data, data_seed=5):
    return Reader(str(data), data_seed=data_seed, views=2, view=VIEW, split="train", loader=LoaderConfig())


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_student_finds_every_clip_and_the_same_bits(data, ckpt, tmp_path):
    assert "24 targets" in run(data, ckpt, tmp_path / "targets")
    reader = reader_of(data)
    batch = reader.clips(range(3 * SHARDS * SAMPLES))  # three passes over two views
    teacher = Teacher.load(ckpt, TeacherComputeConfig(batch_size=BATCH_SIZE), torch.device("cpu"))
    local = LocalTargets(teacher, "float16")
    cached = StoredTargets(
        tmp_path / "targets",
        "float16",
        data=str(data),
        split="train",
        data_seed=5,
        view=VIEW,
        decoder=reader.decoder,
    )
    assert cached.spec == teacher.spec
    results = [source.request(batch).result(timeout=60) for source in (local, cached)]
    assert torch.equal(*results)
    assert len(torch.unique(results[0][:, 0, 0])) == 2 * SHARDS * SAMPLES
    for source in (local, cached):
        source.close()
    reader.close()


def test_what_is_to_come_is_said_and_a_disk_that_is_too_small_is_refused(data, ckpt, tmp_path, monkeypatch):
    per_target = 8 * 24 * 2  # tokens, width, float16
    assert re.search(
        r"24 targets to come: \S+ kB of .* free, at least 0:00:\d\d at \S+ clips/s",
        run(data, ckpt, tmp_path / "a"),
    )
    assert "all 24 targets are there, and are checked" in run(data, ckpt, tmp_path / "a")
    next((tmp_path / "a").rglob("view-1/*000001.arrow")).unlink()
    assert "6 targets to come, 18 more are there" in run(data, ckpt, tmp_path / "a")
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used._replace(free=23 * per_target))
    with pytest.raises(ValueError, match=r"for 24 targets of 8 tokens of width 24 in float16: free the disk"):
        run(data, ckpt, tmp_path / "b")
    assert not list((tmp_path / "b").rglob("*.arrow"))


def test_layout_and_manifest(data, ckpt, tmp_path):
    run(data, ckpt, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    fingerprint = manifest["fingerprint"]
    names = [
        f"{fingerprint}/view-{view}/moving-{shard:06d}.arrow" for view in range(2) for shard in range(SHARDS)
    ]
    assert sorted(files_in(tmp_path)) == sorted([*names, "manifest.json"])
    assert {name: facts["rows"] for name, facts in manifest["files"].items()} == dict.fromkeys(names, SAMPLES)
    assert (manifest["views"], manifest["data_seed"], manifest["skipped"]) == (2, 5, [])
    assert manifest["view"] == VIEW.model_dump(mode="json") | {"version": VIEW_VERSION}


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(data, ckpt, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(data, ckpt, whole)
    start = "from salt_distill.programs import serve; serve()"
    command = [
        sys.executable,
        "-c",
        start,
        "precompute",
        "--ckpt",
        ckpt,
        "--data",
        data,
        "--out",
        killed,
        "--views",
        "2",
    ]
    settings = ["--workers", "0", "--data-seed", "5", "--set", f"teacher.batch_size={BATCH_SIZE}"]
    process = subprocess.Popen([*map(str, command), *settings], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.rglob("view-*/[!.]*.arrow")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in killed.rglob("view-*/[!.]*.arrow")}
    assert first
    run(data, ckpt, killed)
    assert all(
        path.stat().st_mtime_ns == time_ns for path, time_ns in first.items()
    )  # what was whole was not made again
    assert files_in(killed) == files_in(whole)


def test_a_damaged_file_is_named_and_made_anew(data, ckpt, tmp_path):
    run(data, ckpt, tmp_path)
    before = files_in(tmp_path)
    path = next(tmp_path.rglob("view-1/*000001.arrow"))
    row = TargetCache(tmp_path).find(reader_of(data).submit(reader_of(data).samples[1][2], 1).result()[1])
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(bytes(row.encoded.target))] ^= 1
    path.write_bytes(damaged)
    printed = run(data, ckpt, tmp_path)
    assert f"row 2, sample {row.key}, view 1" in printed
    assert files_in(tmp_path) == before


def test_a_bad_video_is_named_and_left_out(data, ckpt, tmp_path):
    spoiled = tmp_path / "shards"
    spoiled.mkdir()
    for path in data.iterdir():
        (spoiled / path.name).write_bytes(path.read_bytes())
    bad = open_dataset(spoiled).samples("train")[1][3]
    packed = (spoiled / bad.tar).stat()
    with (spoiled / bad.tar).open("r+b") as tar:
        tar.seek(bad.offset)
        tar.write(bytes(bad.size))
    os.utime(spoiled / bad.tar, ns=(packed.st_atime_ns, packed.st_mtime_ns))  # a damage that no index saw
    for _ in range(2):  # the second time the rest is there already
        printed = run(spoiled, ckpt, tmp_path / "targets", loader=LoaderConfig(max_bad_fraction=0.2))
        assert f"left out {bad.key}" in printed
        manifest = json.loads((tmp_path / "targets" / "manifest.json").read_text())
        assert manifest["skipped"] == [bad.key]
        assert sum(facts["rows"] for facts in manifest["files"].values()) == 2 * (SHARDS * SAMPLES - 1)
    with pytest.raises(ValueError, match="1 videos that do not decode"):
        run(spoiled, ckpt, tmp_path / "again", loader=LoaderConfig(max_bad_fraction=0))


def test_another_cache_is_not_overwritten(data, ckpt, tmp_path):
    run(data, ckpt, tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="data_seed=5, expected 6: precompute into an empty folder"):
        run(data, ckpt, tmp_path, data_seed=6)
    assert files_in(tmp_path) == before


def test_a_student_takes_the_number_of_views_from_the_cache(data, ckpt, tmp_path):
    run(data, ckpt, tmp_path)
    values = {
        "data": str(data),
        "out": "unused",
        "steps": 1,
        "batch_size": 4,
        "targets": str(tmp_path),
        "optim": {"warmup_steps": 0},
    }
    assert views_of(StudentRun.model_validate(values)) == 2
    assert views_of(StudentRun.model_validate({**values, "views": 2})) == 2
    with pytest.raises(ValueError, match=r"got --views 3, but .* holds 2 views"):
        views_of(StudentRun.model_validate({**values, "views": 3}))
