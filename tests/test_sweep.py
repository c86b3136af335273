"""`salt-train sweep`: what a file means, and real students on a real Ray that share a real service."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console
import yaml
from command_tools import salt
from serve_tools import alive, descendants
from service_tools import wait_until
from teacher_tools import serving
from train_tools import CPU, train

from salt_distill.common.config import (
    StudentRun,
    SweepConfig,
    TeacherComputeConfig,
    TeacherRun,
    dump_yaml,
    load_yaml,
    merge,
)
from salt_distill.common.local_ray import ray_to_join
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.run_directory import read_metrics
from salt_distill.student_trainer.sweep.run import fits, has_ended, needs, run
from salt_distill.student_trainer.sweep.sweep_file import runs_of

SMALL = {
    "steps": 6,
    "batch_size": 8,
    "views": 2,
    "log_every": 1,
    "encoder": {"width": 24, "depth": 1, "num_heads": 2, "mlp_width": 48, "patch_size": 8},
    "predictor": {"width": 12, "depth": 1, "num_heads": 1, "mlp_width": 24},
    "view": {"num_frames": 4, "frame_step": 1, "crop_size": 32},
    "optim": {"warmup_steps": 1},
}
URL = "http://127.0.0.1:1"


@pytest.fixture
def write(tmp_path):
    """Writes a sweep's file; the command that takes it."""

    def write(values, **flags):
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return SweepConfig.model_validate(
            {"file": str(tmp_path / "sweep.yaml"), "out": str(tmp_path / "sizes"), **flags}
        )

    return write


@pytest.mark.faults
def test_runs_share_one_teacher_and_one_that_fails_is_named(shards, tmp_path, write):
    teacher_run = TeacherRun.model_validate(
        SMALL | {"data": str(shards), "out": str(tmp_path / "teacher"), "steps": 2}
    )
    train(teacher_run)
    file = {
        "preset": "nano",
        "common": {**SMALL, "data": str(shards), "cpus_per_worker": 0.5},
        "runs": {"narrow": {}, "wide": {"encoder.width": 40}, "lost": {"data": str(tmp_path / "nowhere")}},
    }

    def sweep(url, *more):
        write(file)
        return salt(
            "salt-train",
            "sweep",
            tmp_path / "sweep.yaml",
            "--teacher-url",
            url,
            "--out",
            tmp_path / "sizes",
            *more,
            check=False,
        )

    teacher = Teacher.load(tmp_path / "teacher", TeacherComputeConfig(batch_size=4), CPU)
    with (
        serving(teacher) as (url, _),
        ray_to_join(None) as ray_arguments,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(
            "RAY_ADDRESS", ray_arguments["address"]
        )  # one Ray for all, since starting it is most of the time
        begun = sweep(url)
        first = json.loads((tmp_path / "sizes" / "summary.json").read_text())
        file["runs"]["lost"] = {}
        continued = sweep(url, "--json")
    assert begun.returncode == 1
    assert "narrow: started with 0.5 CPU; log: " in begun.stderr
    assert "1 of 3 runs failed; the same command continues them. lost: error: " in begun.stderr
    assert {name: of_run["state"] for name, of_run in first["runs"].items()} == {
        "narrow": "done",
        "wide": "done",
        "lost": "failed",
    }
    assert continued.returncode == 0, continued.stderr
    assert "3 runs, 2 of them done" in continued.stderr
    assert "narrow: started" not in continued.stderr
    for shown in ("narrow  ", "wide  ", "failed", "48 forwards for 96 targets, 48 saved"):
        assert shown in begun.stdout
    summary = json.loads(continued.stdout)
    assert {name: of_run["state"] for name, of_run in summary["runs"].items()} == dict.fromkeys(
        file["runs"], "done"
    )
    for name, of_run in summary["runs"].items():
        lines = read_metrics(tmp_path / "sizes" / name)
        assert [line["step"] for line in lines] == list(range(1, 7))
        assert (of_run["loss_last"], of_run["flops"]) == (lines[-1]["loss"], lines[-1]["flops"])
        assert load_yaml(tmp_path / "sizes" / name / "config.yaml")["group"] == "sizes"
    shared = first["sharing"]
    assert (shared["clips_served"], shared["clips_computed"], shared["forwards_avoided"]) == (
        2 * 6 * 8,
        6 * 8,
        6 * 8,
    )  # 48 distinct clips of 80
    assert (summary["sharing"]["clips_served"], summary["sharing"]["clips_computed"]) == (
        3 * 6 * 8,
        6 * 8,
    )  # of all parts of the sweep
    file["common"]["optim"] = {"warmup_steps": 1, "lr": 0.5}
    with pytest.raises(ValueError, match=r"narrow was started with optim\.lr="):
        run(write(file, teacher_url=url), rich.console.Console(quiet=True))


def test_a_grid_is_every_combination_for_every_run(write):
    file = {
        "preset": "nano",
        "common": {"data": "shards", "optim": {"clip_grad": 2.0}},
        "runs": {"a": {}, "b": {"seed": 3}},
    }
    runs = runs_of(
        write(file | {"grid": {"optim.lr": ["1e-3", 2e-3], "encoder.depth": [2]}}, teacher_url=URL)
    )
    assert list(runs) == [
        "a_lr-1e-3_depth-2",
        "a_lr-0.002_depth-2",
        "b_lr-1e-3_depth-2",
        "b_lr-0.002_depth-2",
    ]
    assert [run.optim.lr for run in runs.values()] == [1e-3, 2e-3, 1e-3, 2e-3]
    assert {
        (run.optim.clip_grad, run.encoder.depth, run.data_seed, run.group, run.teacher_url)
        for run in runs.values()
    } == {(2.0, 2, 0, "sizes", (URL,))}
    assert [run.seed for run in runs.values()] == [0, 0, 3, 3]
    assert list(
        runs_of(write({"preset": "nano", "common": {"data": "d"}, "grid": {"seed": [4, 5]}}, teacher_url=URL))
    ) == [
        "seed-4",
        "seed-5",
    ]


def test_a_service_is_asked_instead_of_the_files_source(write):
    for source in ({"targets": "targets"}, {"teacher_ckpt": "teacher"}, {"teacher_url": "http://other:1"}):
        file = {"preset": "nano", "common": {"data": "shards", **source}, "runs": {"a": {}}}
        [run] = runs_of(write(file, teacher_url=URL)).values()
        assert (run.teacher_url, run.targets, run.teacher_ckpt) == ((URL,), (), ())
    reserve = {"data": "shards", "teacher_ckpt": "teacher", "on_teacher_loss": "local"}
    [run] = runs_of(write({"preset": "nano", "common": reserve, "runs": {"a": {}}}, teacher_url=URL)).values()
    assert (run.teacher_url, run.teacher_ckpt) == ((URL,), ("teacher",))


def test_a_run_may_have_a_preset_and_a_mask_of_its_own(write):
    file = {
        "common": {"data": "shards", "targets": "targets"},
        "runs": {"large": {}, "other": {"preset": "vit-b", "mask": "random-tube"}},
    }
    runs = runs_of(write(file))
    assert [run.encoder.width for run in runs.values()] == [1024, 768]
    assert [len(run.mask.sets) for run in runs.values()] == [2, 1]
    assert {run.group for run in runs.values()} == {None}  # no service, no group


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"runs": {"a": {"encoder.widht": 8}}},
            """sweep.yaml, line 7: run a: encoder.widht: unknown key, did you mean 'encoder.width'?""",
        ),
        ({"runs": {"a": {"out": "b"}}}, "run a: got out, expected none of it in the file"),
        ({"runs": {"a": {"workers": 0}}}, "run a: got workers=0, expected at least 1"),
        ({"runs": {"a": {"preset": "vit-x"}}}, "run a: got preset 'vit-x', expected one of"),
        ({"runs": {"a b": {}}}, "got a run named 'a b'"),
        ({"runs": {}}, "got no runs, expected `runs`, `grid` or both"),
        (
            {"runs": {"a": {}, "b": {"teacher_url": None, "targets": "x"}}},
            "got 2 sources of targets, expected one",
        ),
        (
            {"runs": {"a": {}, "b": {"data_seed": 1}}},
            "run b: got data_seed=1, expected 0, as run a has it",
        ),
        ({"grid": {"data_seed": [3, 4]}}, "run a_data_seed-4: got data_seed=4, expected 3, as run a_data_s"),
        (
            {"runs": {"a": {}, "b": {"group": "other"}}},
            "run b: got group=other, expected sizes, as run a has it: runs of different groups do not wait",
        ),
        ({"grid": {"seed": [1, 1]}}, "got two runs named a_seed-1"),
        ({"run": {}}, """sweep.yaml, line 7: run: unknown key, did you mean 'runs'?"""),
    ],
)
def test_what_is_wrong_in_a_file_names_the_run(write, change, sentence):
    file = {"preset": "nano", "common": {"data": "shards", "teacher_url": URL}, "runs": {"a": {}}}
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - of pydantic too
        runs_of(write(merge(file, {}) | change))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optim": {"lr": 0.5}}, r"b was started with optim\.lr=.*got optim\.lr=0\.5"),
        ({"steps": 40}, r"got --steps 40, but .*b has done 50: give at least as many"),
    ],
)
def test_a_changed_value_of_a_run_that_has_begun_is_refused_before_another_starts(write, change, sentence):
    """Run b was killed: it has a checkpoint and no summary.json."""
    file = {"preset": "nano", "common": {"data": "nowhere"}, "runs": {"a": {}, "b": {}}}
    command = write(file, teacher_url=URL)
    begun = runs_of(command)["b"]
    (out := Path(begun.out)).mkdir(parents=True)
    (out / "config.yaml").write_text(dump_yaml(begun))
    (out / "checkpoint").write_text("checkpoints/step-50\n")
    before = sorted(Path(command.out).rglob("*"))
    with pytest.raises(ValueError, match=sentence):
        run(write(file | {"runs": {"a": {}, "b": change}}, teacher_url=URL), rich.console.Console(quiet=True))
    assert sorted(Path(command.out).rglob("*")) == before


def test_a_run_without_gain_is_done_until_it_may_wait_longer(write):
    values = {"data": "nowhere", "val_every": 10, "stop_after_no_gain": 2}
    file = {"preset": "nano", "common": values, "runs": {"a": {}}}
    [begun] = runs_of(write(file, teacher_url=URL)).values()
    (out := Path(begun.out)).mkdir(parents=True)
    (out / "config.yaml").write_text(dump_yaml(begun))
    (out / "checkpoint").write_text("checkpoints/step-50\n")
    (out / "summary.json").write_text(json.dumps({"steps": 50, "ended_early": True}))
    for changes, is_done in (
        ({}, True),
        ({"steps": 2 * begun.steps}, True),
        ({"stop_after_no_gain": 3}, False),
        ({"stop_after_no_gain": None}, False),
    ):
        [now] = runs_of(write(file | {"runs": {"a": changes}}, teacher_url=URL)).values()
        assert has_ended(now) is is_done


def test_a_run_starts_where_its_workers_have_room():
    values = {**SMALL, "data": "d", "out": "o", "teacher_url": URL, "batch_size": 96}
    small, large = (
        StudentRun.model_validate(values | more)
        for more in ({"gpus_per_worker": 0}, {"workers": 2, "cpus_per_worker": 2, "gpus_per_worker": 0.5})
    )
    room = {"CPU": 6.0, "GPU": 1.0}
    assert needs(StudentRun.model_validate(values), room) == {"CPU": 1.0, "GPU": 1.0}  # GPUs are used
    assert needs(StudentRun.model_validate(values), {"CPU": 6.0}) == {"CPU": 1.0, "GPU": 0.0}
    assert needs(large, {}) == {"CPU": 4.0, "GPU": 1.0}
    assert fits(large, [small, small], room)
    assert not fits(large, [small, small, small], room)
    assert not fits(large, [large], room)
    assert not fits(large, [], {"CPU": 6.0})


@pytest.mark.faults
def test_a_sweep_that_is_ended_takes_its_runs_and_its_ray_along(shards, tmp_path, write):
    teacher_run = TeacherRun.model_validate(
        SMALL | {"data": str(shards), "out": str(tmp_path / "teacher"), "steps": 2}
    )
    train(teacher_run)
    common = {
        **SMALL,
        "data": str(shards),
        "cpus_per_worker": 0.5,
        "steps": 1_000_000,
        "teacher_ckpt": str(tmp_path / "teacher"),
    }
    write({"preset": "nano", "common": common, "grid": {"seed": [0, 1]}})
    program = [
        sys.executable,
        "-c",
        "from salt_distill.programs import train; train()",
        "sweep",
        tmp_path / "sweep.yaml",
        "--out",
        tmp_path / "sizes",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        wait_until(
            lambda: all((tmp_path / "sizes" / f"seed-{seed}" / "metrics.jsonl").exists() for seed in (0, 1)),
            seconds=240,
        )
        started = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    wait_until(lambda: not alive(started), seconds=30)
