"""A run may start from weights that somebody trained, and says so ever after."""

import shutil
from pathlib import Path

import pytest
import torch
from foreign_tools import encoder_config
from train_tools import ALONE, RandomClips, new_model, small_run, tensors_of

from salt_distill.common.config import FrozenConfig, TeacherRun, TrainConfig, VJepaRun
from salt_distill.common.model.checkpoint import load_vit, open_encoder, read_config, save_checkpoint
from salt_distill.common.model.teacher import fingerprint
from salt_distill.student_trainer.init import start_from
from salt_distill.student_trainer.loop import train_on
from salt_distill.student_trainer.run_directory import claimed


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A V-Pixel checkpoint; read only."""
    objective, checkpoint_config = new_model(small_run(TeacherRun, seed=7))
    path = tmp_path_factory.mktemp("trained") / "trained"
    save_checkpoint(path, checkpoint_config, tensors_of(objective), {})
    return path


def equal(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_encoder_and_predictor_start_from_a_checkpoint_of_ours(trained, capsys):
    config = small_run(TeacherRun)
    objective, _ = new_model(config)
    identity = start_from(str(trained), objective, config, ALONE)
    frozen = open_encoder(FrozenConfig(ckpt=str(trained)))
    assert identity == fingerprint(frozen, frozen.load())
    assert equal(objective.encoder, load_vit(trained))
    assert f"fingerprint {identity[:12]}; the predictor is the checkpoint's" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["as_hf", "as_pt"])
def test_a_moving_average_starts_from_an_encoder_of_others_on_other_clips(kind, request, capsys):
    path = request.getfixturevalue(kind)
    encoder = encoder_config()
    view = {"num_frames": 4 * encoder.tubelet_size, "frame_step": 1, "crop_size": 3 * encoder.patch_size}
    config = small_run(VJepaRun, encoder=encoder.model_dump(), view=view)
    objective, _ = new_model(config)
    start_from(str(path), objective, config, ALONE)
    weights = open_encoder(FrozenConfig(ckpt=str(path))).load()
    assert equal(objective.encoder, weights)
    assert equal(objective.target_encoder, weights)
    assert "the predictor starts afresh: only a checkpoint of ours" in capsys.readouterr().out


def test_encoders_of_other_sizes_or_positions_are_refused(trained):
    config = small_run(TeacherRun, encoder={"width": 64, "depth": 1, "num_heads": 2, "patch_size": 8})
    objective, _ = new_model(config)
    with pytest.raises(ValueError, match=r"with width=32, depth=2, .*expected the run's width=64, depth=1, "):
        start_from(str(trained), objective, config, ALONE)
    with pytest.raises(ValueError, match="no video ViT with rotary positions"):
        start_from("timm-random:vit_tiny_patch16_224", objective, config, ALONE)


def test_a_run_says_what_it_started_from_also_when_it_goes_on_without_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "init")

    def run(**values) -> TrainConfig:
        return small_run(
            TeacherRun,
            **{"out": str(tmp_path / "run"), "init": str(tmp_path / "init"), "batch_size": 6, "log_every": 1},
            **values,
        )

    def train(config: TrainConfig) -> str | None:
        with claimed(config) as checkpoint:
            train_on(RandomClips(config.view.clip_shape), (), config, ALONE, checkpoint)  # type: ignore[arg-type]
        return read_config(config.out).init_fingerprint

    identity = train(run(steps=4))
    assert identity is not None
    shutil.rmtree(tmp_path / "init")
    assert train(run(steps=5, resume=True)) == identity
