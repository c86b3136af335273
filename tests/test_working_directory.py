"""A path is where the command was given, wherever its workers are."""

from pathlib import Path

import pytest
from command_tools import losses, salt

from salt_distill.common.config import PrecomputeConfig, ServeConfig, StudentRun, TeacherRun, VJepaRun
from salt_distill.common.local_ray import ray_to_join

NO_PATHS = {
    "address",
    "estimate_out",
    "group",
    "host",
    "name",
    "predict_label",
    "replicas",
    "resource",
    "split",
    "teacher_url",
    "wandb",
}


def test_every_path_of_what_goes_to_workers_is_named_as_one():
    for kind in (ServeConfig, PrecomputeConfig, TeacherRun, StudentRun, VJepaRun):
        texts = {
            name
            for name, field in kind.model_fields.items()
            if field.annotation in (str, str | None, tuple[str, ...])
        }
        assert texts - NO_PATHS == set(kind.paths), kind


def test_paths_become_those_of_this_directory_and_addresses_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    values = {
        "data": "s3://bucket/shards",
        "out": "runs/a",
        "steps": 1,
        "batch_size": 4,
        "optim": {"warmup_steps": 0},
        "teacher_ckpt": "timm:vit",
    }
    config = StudentRun.model_validate(
        values | {"loader": {"shard_cache_dir": "../kept"}, "storage": "/stored"}
    )
    there = config.absolute()
    assert (there.data, there.teacher_ckpt, there.storage, there.targets) == (
        "s3://bucket/shards",
        ("timm:vit",),
        "/stored",
        (),
    )
    assert there.out == str(tmp_path / "runs" / "a")
    assert Path(str(there.loader.shard_cache_dir)).resolve() == tmp_path.parent / "kept"
    assert there.model_copy(update={"out": config.out, "loader": config.loader}) == config


@pytest.mark.faults
def test_workers_of_a_ray_that_was_started_elsewhere_find_relative_paths(shards, monkeypatch, tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    elsewhere.mkdir()
    here.mkdir()
    (here / "shards").symlink_to(shards)
    monkeypatch.chdir(elsewhere)
    with ray_to_join(None) as ray_arguments:
        monkeypatch.chdir(here)
        on_it = [
            "--address",
            ray_arguments["address"],
            "--workers",
            2,
            "--cpus-per-worker",
            0.5,
            "--data",
            "shards",
        ]
        small = [
            "--preset",
            "nano",
            "--steps",
            3,
            "--batch-size",
            48,
            "--log-every",
            1,
            "--set",
            "optim.warmup_steps=1",
            *on_it,
        ]
        salt("salt-train", "teacher", "--out", "teacher", *small)
        salt("salt-serve", "precompute", "--ckpt", "teacher", "--views", 2, "--out", "targets", *on_it)
        salt("salt-train", "student", "--targets", "targets", "--out", "student", *small)
    assert len(losses(here / "student")) == 3
    assert not list(elsewhere.iterdir())
