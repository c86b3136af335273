"""Encoders of others in every place that takes a frozen encoder."""

import io
import json
from pathlib import Path

import pytest
import rich.console
import torch
from eval_tools import make_dataset
from foreign_tools import encoder_config, exported, save_ours
from teacher_tools import serving
from train_tools import train

from salt_distill.common.config import (
    FrozenConfig,
    PrecomputeConfig,
    ProbeConfig,
    StudentRun,
    TeacherComputeConfig,
    preset_layer,
)
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.evaluation.probe.run import run as probe
from salt_distill.student_trainer.run_directory import read_metrics
from salt_distill.teacher_server.precompute import precompute

COMPUTE = TeacherComputeConfig(batch_size=8)
CLIP = {"num_frames": 8, "crop_size": 32}  # the nano student's, which is not what these checkpoints say


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory) -> dict[str, str]:
    """One encoder in three formats, and one of timm."""
    folder = tmp_path_factory.mktemp("world")
    ours = save_ours(folder / "ours", encoder_config(patch_size=8))
    formats = {
        "hf": exported(ours, folder / "hf", "hf", crop_size=64),
        "pt": exported(ours, folder / "x.pt", "vjepa2"),
    }
    return {name: str(path) for name, path in ({"ours": ours} | formats).items()} | {
        "timm": "timm-random:test_vit"
    }


def student(data: Path, out: Path, **source) -> tuple[list[float], dict]:
    """Losses and summary of two steps."""
    small = {
        "encoder": {"width": 24, "num_heads": 2, "depth": 1, "mlp_width": 48, "patch_size": 8},
        "optim": {"warmup_steps": 1},
    }
    values = {
        **preset_layer(StudentRun, "nano"),
        **small,
        "steps": 2,
        "batch_size": 6,
        "log_every": 1,
        "workers": 0,
        "views": 1,
    }
    config = StudentRun.model_validate(
        {**values, "data": str(data), "out": str(out), "teacher": COMPUTE, **source}
    )
    train(config)
    return [line["loss"] for line in read_metrics(out)], json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("kind", ["hf", "timm"])
def test_students_learn_alike_in_process_served_and_from_disk(kind, ckpts, shards, tmp_path):
    ckpt, grid = ckpts[kind], {"patch_size": 8, "tubelet_size": 2}
    losses, summary = student(shards, tmp_path / "in-process", teacher_ckpt=ckpt)
    assert summary["teacher"]["clip_shape"] == [8, 32, 32, 3]
    assert summary["teacher"]["grid"] == [4, 4, 4]
    with serving(
        Teacher(open_encoder(FrozenConfig(ckpt=ckpt, **CLIP, **grid)), COMPUTE, torch.device("cpu"))
    ) as (url, _):
        served, _ = student(shards, tmp_path / "served", teacher_url=url)
    drawn = {"frame_step": 2, "scale": (0.9, 1.0), "flip": False}  # nano's, not the paper's
    values = {
        "ckpt": ckpt,
        "data": str(shards),
        "out": str(tmp_path / "targets"),
        "views": 1,
        "workers": 0,
        "teacher": COMPUTE,
    }
    precompute(
        PrecomputeConfig.model_validate({**values, **CLIP, **grid, "view": drawn}),
        rich.console.Console(file=io.StringIO()),
    )
    cached, _ = student(shards, tmp_path / "cached", targets=str(tmp_path / "targets"))
    assert losses == served == cached
    assert all(0.3 < loss < 2 for loss in losses)


def test_targets_of_another_view_are_no_hit(ckpts, shards, tmp_path):
    values = {
        "ckpt": ckpts["hf"],
        "data": str(shards),
        "out": str(tmp_path / "targets"),
        "views": 1,
        "workers": 0,
        "teacher": COMPUTE,
    }
    precompute(PrecomputeConfig.model_validate({**values, **CLIP}), rich.console.Console(file=io.StringIO()))
    with pytest.raises(
        ValueError, match=r"Different: view: here .*'frame_step': 2.* in the cache .*'frame_step': 1"
    ):
        student(shards, tmp_path / "run", targets=str(tmp_path / "targets"))


def test_a_student_of_another_grid_is_told(ckpts, shards, tmp_path):
    wide = {"encoder": {"width": 24, "num_heads": 2, "depth": 1, "mlp_width": 48, "patch_size": 16}}
    with pytest.raises(ValueError, match="got a token grid of 2 frames by 16 pixels, expected 2 by 8"):
        student(shards, tmp_path / "run", teacher_ckpt=ckpts["pt"], **wide)


def test_probe_of_everything(ckpts, tmp_path):
    data = make_dataset(tmp_path / "toy", num_clips=18)
    values = {
        "data": str(data),
        "out": str(tmp_path / "probe.json"),
        "epochs": 2,
        "batch_size": 8,
        "num_frames": 4,
        "crop_size": 32,
    }
    probe(ProbeConfig(ckpt=tuple(ckpts.values()), random_init=True, **values))
    accuracy = json.loads((tmp_path / "probe.json").read_text())["accuracy"]
    assert list(accuracy) == ["random-init", "ours", "hf", "x.pt", "timm-random:test_vit"]
    assert accuracy["ours"] == accuracy["hf"] == accuracy["x.pt"]
    with pytest.raises(
        ValueError, match=r"--random-init with timm-random:test_vit first.*give --ckpt timm-random:NAME"
    ):
        probe(ProbeConfig(ckpt=(ckpts["timm"],), random_init=True, **values))
