"""Chained teachers: whatever a run leaves behind can be the next student's frozen teacher (Table 16 of the
paper, 80k + 80k)."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from teacher_tools import serving
from train_tools import CPU, train

from salt_distill.common.config import (
    FrozenConfig,
    PrecomputeConfig,
    StudentRun,
    TeacherComputeConfig,
    TeacherRun,
    TrainConfig,
    VJepaRun,
    merge,
)
from salt_distill.common.model.checkpoint import open_encoder, read_config
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.run_directory import read_metrics
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


def run(kind: type[TrainConfig], shards: Path, out: Path, **values) -> list[float]:
    config = kind.model_validate(merge(SMALL, {"data": str(shards), "out": str(out)}, values))
    train(config)
    return [line["loss"] for line in read_metrics(out)]


WIDE = {"view": {"crop_size": [16, 32]}}


@pytest.fixture(scope="module")
def student(shards, tmp_path_factory) -> Path:
    """A student of a V-Pixel teacher, wider than it."""
    folder = tmp_path_factory.mktemp("chain")
    run(TeacherRun, shards, folder / "teacher")
    run(StudentRun, shards, folder / "student-a", teacher_ckpt=str(folder / "teacher"), encoder={"width": 40})
    return folder / "student-a"


@pytest.mark.parametrize("clip", [{}, WIDE])
def test_a_student_teaches_the_next_one_in_process_served_and_cached(student, shards, tmp_path, clip):
    local = run(StudentRun, shards, tmp_path / "local", teacher_ckpt=str(student), **clip)
    choice = FrozenConfig.model_validate({"ckpt": str(student), **clip.get("view", {})})
    teacher = Teacher(open_encoder(choice), TeacherComputeConfig(), CPU)
    assert teacher.spec.grid == ((2, 2, 4) if clip else (2, 4, 4))
    with serving(teacher) as (url, _):
        served = run(StudentRun, shards, tmp_path / "served", teacher_url=url, **clip)
    values = choice.model_dump(exclude_none=True) | {"data": str(shards), "out": str(tmp_path / "targets")}
    precompute(PrecomputeConfig.model_validate(values | {"views": 2, "workers": 0}), Console(quiet=True))
    cached = run(StudentRun, shards, tmp_path / "cached", targets=str(tmp_path / "targets"), **clip)
    assert cached == served == local
    config = read_config(tmp_path / "served")
    assert (config.objective, config.encoder.width, config.predictor_out_width) == (
        "salt",
        24,
        (40,),
    )  # a teacher of another width
    assert config.teacher_fingerprint == (teacher.spec.fingerprint,)
    assert json.loads((tmp_path / "local" / "summary.json").read_text())["teacher"]["name"] == "student-a"


def test_the_moving_average_of_a_vjepa_run_can_teach(shards, tmp_path):
    run(VJepaRun, shards, tmp_path / "ema", ema={"start": 0.5})
    losses = run(StudentRun, shards, tmp_path / "student", teacher_ckpt=str(tmp_path / "ema"))
    assert len(losses) == 3
    checkpoint = tmp_path / "ema" / "checkpoints" / "step-3"
    assert (checkpoint / "model.safetensors").read_bytes() != (checkpoint / "online.safetensors").read_bytes()


def test_another_token_grid_is_refused_in_process_and_served(student, shards, tmp_path):
    other_patch = {"encoder": {"patch_size": 16}}
    with pytest.raises(
        ValueError, match="choose the student's patch_size and tubelet_size to match the teacher's"
    ):
        run(StudentRun, shards, tmp_path / "local", teacher_ckpt=str(student), **other_patch)
    for number, other in enumerate((other_patch, {"view": {"num_frames": 8}})):
        with (
            serving(Teacher.load(student, TeacherComputeConfig(), CPU)) as (url, _),
            pytest.raises(
                ValueError, match=r"expected the same: give the student .*--set encoder\.patch_size=8$"
            ),
        ):
            run(StudentRun, shards, tmp_path / f"served-{number}", teacher_url=url, **other)
