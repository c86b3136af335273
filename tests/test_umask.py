"""What our commands write is for the group to read where the umask says so, and for nobody more."""

import os
import stat
from pathlib import Path

import pytest
import torch
from command_tools import SMALL, write_targets
from safetensors.torch import save_file

from salt_distill.common.data.making.cli import app as data
from salt_distill.common.whole import whole_file, whole_folder, write_whole
from salt_distill.student_trainer.cli import app as train
from salt_distill.student_trainer.evaluation.cli import app as evaluate

TWO_STEPS = [*SMALL, "--steps", 2, "--batch-size", 6, "--set", "optim.warmup_steps=1", "--workers", 0]


@pytest.fixture(params=[0o027, 0o002], ids=["0027", "0002"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def closed(folder: Path, umask: int) -> dict[str, str]:
    """Files and folders whose modes are others than the umask has it."""
    found = {}
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink() and mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            found[str(path.relative_to(folder))] = f"{mode:o}"
    return found


def test_a_file_that_a_library_renames_is_open_to_the_group(umask, tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as partial:
        (partial / "below").mkdir()
        save_file({"a": torch.zeros(2)}, partial / "below" / "a.safetensors")
    with whole_file(out / "b.safetensors") as partial:
        save_file({"a": torch.zeros(2)}, partial)
    write_whole(out / "new" / "c.json", "{}")
    assert closed(out, umask) == {}


@pytest.mark.slow
def test_what_commands_write_is_open_to_the_group(synth_videos, tmp_path, monkeypatch):
    def run(app, *arguments: object) -> None:
        app([str(argument) for argument in arguments], standalone_mode=False)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = os.umask(0o027)
    try:
        shards, teacher, targets = tmp_path / "shards", tmp_path / "teacher", tmp_path / "targets"
        run(data, "pack", synth_videos, shards, "--workers", 1)
        run(
            train,
            "teacher",
            "--data",
            shards,
            "--out",
            teacher,
            *TWO_STEPS,
            "--storage",
            tmp_path / "storage",
        )
        write_targets(teacher, shards, targets)
        run(
            train, "student", "--data", shards, "--out", tmp_path / "cached", "--targets", targets, *TWO_STEPS
        )
        local = ["--teacher-ckpt", teacher]
        run(train, "student", "--data", shards, "--out", tmp_path / "local", *local, *TWO_STEPS)
        run(train, "teacher", "--data", shards, "--out", teacher, *TWO_STEPS, "--steps", 3, "--resume")
        run(evaluate, "export", "--ckpt", teacher, "--out", tmp_path / "hf", "--format", "hf")
        run(evaluate, "embed", synth_videos, "--ckpt", teacher, "--out", tmp_path / "features.parquet")
        probe = ["--data", shards, "--workers", 0, "--epochs", 1, "--features", tmp_path / "kept"]
        run(evaluate, "probe", "--ckpt", teacher, *probe, "--out", tmp_path / "probe.json")
        label = ["--probe", tmp_path / "probe.safetensors", "--label", "digit"]
        run(evaluate, "export", "--ckpt", teacher, *label, "--out", tmp_path / "classifier", "--format", "hf")
    finally:
        os.umask(before)
    monkeypatch.undo()
    assert closed(tmp_path, 0o027) == {}
