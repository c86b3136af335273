"""`salt-train ... --estimate`: real steps on random clips, the whole run's time, FLOPs and memory, and
nothing trained or read."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from teacher_tools import ENCODER as TEACHER
from teacher_tools import VIEW, load_teacher, save_teacher, serving

import salt_distill.student_trainer.cli
from salt_distill.common.command import run_app
from salt_distill.common.config import (
    EncoderConfig,
    FlopsConfig,
    PredictorConfig,
    StudentRun,
    TeacherRun,
    VJepaRun,
)
from salt_distill.common.model.compute import set_up
from salt_distill.common.model.flops import encoder_forward
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.roofline import GPUS
from salt_distill.common.model.vit import Encoder
from salt_distill.student_trainer.estimate import estimate
from salt_distill.student_trainer.estimate_table import RunEstimate, duration
from salt_distill.student_trainer.evaluation.flops_table import runs_of
from salt_distill.student_trainer.gpu_estimate import CONTEXT_BYTES, estimate_on, expected_run_s
from salt_distill.student_trainer.objective import new_objective
from salt_distill.student_trainer.opening import expected_time
from salt_distill.student_trainer.optim import new_optimizer
from salt_distill.student_trainer.step_count import count_step, masks_of, step_once

ENCODER = EncoderConfig(width=36, depth=2, num_heads=3, mlp_width=100, patch_size=8)
RUN = {
    "data": "no-such-data",
    "out": "no-such-run",
    "steps": 50,
    "batch_size": 5,
    "workers": 0,
    "encoder": ENCODER,
    "predictor": PredictorConfig(width=24, depth=3, num_heads=2, mlp_width=60),
    "view": VIEW,
    "optim": {"warmup_steps": 5},
}
CPU = torch.device("cpu")


def check_estimate(found: RunEstimate, config, objective: str) -> None:
    clips = config.steps * config.batch_size
    student = found.student
    assert (found.objective, found.steps, found.batch_size) == (
        objective,
        config.steps,
        config.batch_size,
    )
    assert student.timed_steps == 20
    assert 0 < student.optimizer_s < student.step_s
    assert student.clips_per_s == pytest.approx(found.clips_per_worker / student.step_s)
    assert student.flops_per_s == pytest.approx(
        student.exact / clips * student.clips_per_s, rel=0.1
    )  # of the timed steps' masks
    assert found.run_s == pytest.approx(config.steps * found.step_s)
    assert 50e6 < found.peak_memory_bytes < 100e9


@pytest.mark.parametrize("objective", ["vpixel", "vjepa"])
def test_an_estimate_times_real_steps_and_counts_the_whole_run(objective):
    config = {"vpixel": TeacherRun, "vjepa": VJepaRun}[objective].model_validate(RUN)
    found = estimate(config, CPU)
    check_estimate(found, config, objective)
    assert found.teacher is None
    teacher = {"vpixel": None, "vjepa": "ema"}[objective]
    values = {
        name: getattr(config, name)
        for name in ("steps", "batch_size", "seed", "encoder", "predictor", "view", "mask")
    }
    counted = runs_of(FlopsConfig(teacher=teacher, **values))[0]
    assert (found.six_n_d, found.exact) == (counted.six_n_d.total, counted.exact.total)


def test_a_large_batch_is_extrapolated_to_the_worker_with_most_clips():
    config = TeacherRun.model_validate(
        RUN | {"batch_size": 130, "workers": 2}
    )  # six mask groups: two workers take three each
    found = estimate(config, CPU)
    check_estimate(found, config, "vpixel")
    assert (found.clips_per_worker, found.student.timed_clips_per_step) == (72, 48)
    assert found.worker_s == pytest.approx(2 * found.run_s)


def test_a_teacher_in_process_is_timed_apart(tmp_path):
    config = StudentRun.model_validate(RUN | {"teacher_ckpt": str(save_teacher(tmp_path / "teacher"))})
    found = estimate(config, CPU)
    check_estimate(found, config, "salt")
    teacher = found.teacher
    assert teacher is not None
    assert teacher.where == "in-process"
    assert teacher.step_s == pytest.approx(config.batch_size / teacher.clips_per_s)
    assert found.step_s == pytest.approx(found.student.step_s + teacher.step_s)
    tokens = token_grid(VIEW, TEACHER).num_tokens
    assert teacher.exact == encoder_forward(TEACHER, tokens).total * config.steps * config.batch_size
    assert found.exact == found.student.exact + teacher.exact


def test_a_served_teacher_takes_no_time_here(tmp_path):
    with serving(load_teacher(tmp_path)) as (url, service):
        config = StudentRun.model_validate(RUN | {"teacher_url": url})
        found = estimate(config, CPU)
        assert service.metrics().clips_computed == 0
    check_estimate(found, config, "salt")
    assert found.teacher is not None
    assert found.teacher.where == "service"
    assert (found.teacher.step_s, found.exact) == (0, None)
    assert found.step_s == found.student.step_s
    parameters = sum(parameter.numel() for parameter in Encoder(TEACHER).parameters())
    assert (
        found.teacher.six_n_d
        == 2 * parameters * token_grid(VIEW, TEACHER).num_tokens * config.steps * config.batch_size
    )


def test_the_flag_trains_nothing_and_reads_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sizes = [
        f"--set=encoder.{name}={value}" for name, value in (("width", 24), ("num_heads", 2), ("depth", 1))
    ]
    flags = [
        "--preset",
        "nano",
        "--data",
        "none",
        "--out",
        "run",
        "--estimate",
        "--estimate-out",
        "e.json",
        *sizes,
    ]
    monkeypatch.setattr(sys, "argv", ["salt-train", "teacher", *flags])
    with pytest.raises(SystemExit) as ended:
        run_app(salt_distill.student_trainer.cli.app)
    text = capsys.readouterr().out
    assert not ended.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
    found = json.loads((tmp_path / "e.json").read_text())
    assert "1,500 steps of 24 clips, 24 of them on a worker" in text
    assert f"Timed on {found['device']}, {found['dtype']}: 20 steps of 24 random clips" in text


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"estimate_out": "e.json"}, "without --estimate"),
        ({"estimate": True, "resume": True}, "got --estimate with --resume"),
        ({"gpu": "h100"}, "got --gpu h100 without --estimate"),
    ],
)
def test_estimates_that_make_no_sense_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        TeacherRun.model_validate(RUN | values)


# --- on a GPU that is not here ---


def real_peak_bytes(step) -> int:
    """Most that PyTorch's CPU allocator gave out while ``step`` ran, over what it had given out before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    sizes, events = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = np.cumsum([size for _, size in sorted(sizes)])
    return int(held.max())


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_the_counted_peak_is_that_of_real_tensors(checkpointing):
    config = VJepaRun.model_validate(
        RUN
        | {
            "batch_size": 24,
            "predictor": PredictorConfig(width=48, depth=1, num_heads=2, mlp_width=96),
            "encoder": EncoderConfig(width=96, depth=2, num_heads=3, mlp_width=384, patch_size=8),
            "view": {"num_frames": 8, "frame_step": 1, "crop_size": 64},
            "compute": {"dtype": "float32", "activation_checkpointing": checkpointing},
        }
    )
    count = count_step(config, 96)
    usual, largest = masks_of(config)
    objective, _ = new_objective(config)
    set_up(objective, config.compute, CPU)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    step_once(objective, optimizer, config, [usual], [96])
    optimizer.zero_grad()
    peak = real_peak_bytes(lambda: step_once(objective, optimizer, config, [largest], [96]))
    gradients = count.weight_bytes
    assert count.peak_bytes - count.state_bytes + gradients == pytest.approx(peak, rel=0.1)


def test_a_gpu_that_is_not_here_is_told_to_fit_or_what_would(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    smaller = [f"--set={name}.depth=1" for name in ("encoder", "predictor")]
    flags = ["--preset", "nano", *smaller]  # neither --data nor --out: nothing is read
    monkeypatch.setitem(GPUS, "l4", replace(GPUS["l4"], memory_bytes=CONTEXT_BYTES + 13e6))
    asked = ["salt-train", "student", *flags, "--estimate", "--estimate-out", "e.json", "--gpu", "l4"]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as ended:
        run_app(salt_distill.student_trainer.cli.app)
    assert not ended.value.code
    text, written = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    assert "SALT, 24 clips on each of 1 l4: does not fit. It takes" in text
    assert "It would fit with: activation checkpointing" in text
    assert "not measured" in text
    assert written["fits"] is False
    assert all(way["memory_bytes"] <= GPUS["l4"].memory_bytes for way in written["would_fit"])
    assert 0 < written["step_s"][0] < written["step_s"][1]
    assert written["run_s"][0] == pytest.approx(1500 * written["step_s"][0])
    # What salt-plan reads of it.
    assert written["student"]["clips_per_s"] == pytest.approx(24 / written["step_s"][1])
    assert written["device"] == "l4, counted"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [StudentRun, VJepaRun])
def test_the_line_at_the_start_says_the_time_of_a_gpu_that_the_table_has(kind, tmp_path, monkeypatch):
    """What it counts of models of one and two blocks is what `--estimate --gpu` counts of the whole."""
    teacher = {"teacher_ckpt": str(save_teacher(tmp_path))} if kind is StudentRun else {}
    config = kind.model_validate(RUN | teacher | {"encoder": ENCODER.model_copy(update={"depth": 4})})
    device = torch.device("cuda")
    generator = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    low, high = estimate_on(config, "l4").run_s
    assert expected_run_s(config, "l4", []) == pytest.approx((low, high), rel=1e-6)
    assert expected_time(config, device, []) == (
        f"{duration(low)} to {duration(high)} by the estimate for l4, without reading clips"
    )
    assert torch.equal(torch.get_rng_state(), generator), "a run's random numbers are its own"


def test_the_line_at_the_start_promises_no_time_of_another_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L40S")
    for device in (CPU, torch.device("cuda")):
        said = expected_time(TeacherRun.model_validate(RUN), device, [])
        assert said == "the time that it takes is shown after the first steps"
