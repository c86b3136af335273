"""What a run shows of itself while it trains: the live display, plain lines, MFU, Weights & Biases."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from service_tools import wait_until
from student_tools import open_source
from train_tools import CPU, SMALL, small_run, train_on_random_clips

from salt_distill.common.config import (
    EncoderConfig,
    FrozenConfig,
    StudentRun,
    TeacherComputeConfig,
    TeacherRun,
    VJepaRun,
)
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.compute import matrix_peak
from salt_distill.common.model.flops import FORWARD_FLOPS, encoder_forward
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.progress import PLAIN_LINES, curve, show_progress
from salt_distill.student_trainer.run_directory import read_metrics
from salt_distill.student_trainer.targets.reserved_targets import ReservedTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.student_trainer.targets.stored_targets import StoredTargets
from salt_distill.student_trainer.utilisation import Utilisation

NUM_TOKENS = 2 * 4 * 4


def shown(out, *, terminal, **values):
    """What a run of ten steps writes to a terminal, or to a file."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    with show_progress(out, SMALL["steps"], console):
        train_on_random_clips(small_run(TeacherRun, out=str(out), log_every=1, **values))
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())


@pytest.fixture
def out(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_terminal_shows_loss_speed_utilisation_waits_tokens_and_time_left(out):
    text = shown(out, terminal=True)
    last = read_metrics(out)[-1]
    final = text[text.rindex("run ━") :]
    assert "10/10" in final
    assert re.search(
        rf"loss {last['loss']:.4f} [▁-█]{{10}}  lr {last['lr']:.2e}  gradient norm {last['grad_norm']:.3g}",
        final,
    ), final
    assert re.search(
        rf"clips/s {last['clips_per_s']:,.1f}  tokens/s {last['tokens_per_s']:,.0f}  MFU {last['mfu']:.1%}",
        final,
    ), final
    assert (
        f"tokens: context {last['context_fraction']:.1%}  target {last['target_fraction']:.1%}  bad clips 1"
        in final
    )
    assert re.search(r"ETA 0:00:00", final)


def test_a_file_gets_a_few_plain_lines(out):
    lines = shown(out, terminal=False).splitlines()
    assert 2 <= len(lines) <= PLAIN_LINES
    assert all(
        re.match(
            r"run: step \d+/10  loss \d\.\d{4}  \d+ clips/s  MFU \d+\.\d%  waits: .*  ETA 0:00:\d\d$", line
        )
        for line in lines
    ), lines
    assert "step 10/10" in lines[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_held_out_loss_is_shown_with_its_best(out, terminal):
    text = shown(out, terminal=terminal, val_every=5, val_clips=24)
    losses = {line["val_loss"]: line["step"] for line in read_metrics(out) if "val_loss" in line}
    assert list(losses.values()) == [5, 10]
    newest, least = list(losses)[-1], min(losses)
    assert f"held-out loss {newest:.4f}, best {least:.4f} at step {losses[least]}" in text


def test_a_curve_goes_from_the_smallest_to_the_largest():
    assert curve([3.0, 2.0, 1.0]) == "█▅▁"
    assert curve([2.0, 2.0]) == "▁▁"


def test_utilisation_is_what_the_workers_compute_over_the_peak_that_was_measured(out):
    config = small_run(TeacherRun, out=str(out))
    train_on_random_clips(config)
    line, environment = read_metrics(out)[-1], json.loads((out / "environment.json").read_text())[-1]
    assert line["tokens_per_s"] == pytest.approx(NUM_TOKENS * line["clips_per_s"])
    of_clip = Utilisation.of(config, out_width=384, target_flops=0.0, peak_flops_per_s=1.0).clip_flops
    assert line["mfu"] == pytest.approx(line["clips_per_s"] * of_clip / environment["peak_flops_per_s"])
    assert 0 < line["mfu"] < 1


def test_a_teacher_counts_where_it_runs_in_the_workers(out):
    train_on_random_clips(small_run(TeacherRun, out=str(out)))
    forward = encoder_forward(EncoderConfig(**SMALL["encoder"]), NUM_TOKENS).total

    def clip_flops(run, target_flops=0.0, **values):
        return Utilisation.of(
            small_run(run, **values), out_width=32, target_flops=target_flops, peak_flops_per_s=1.0
        ).clip_flops

    source = open_source(small_run(StudentRun, teacher_ckpt=str(out)), run="a")
    source.close()
    assert source.clip_flops == forward
    served = clip_flops(StudentRun, teacher_url="http://127.0.0.1:1")
    assert clip_flops(StudentRun, source.clip_flops, teacher_ckpt=str(out)) - served == pytest.approx(forward)
    assert clip_flops(VJepaRun) - served == pytest.approx(forward)
    assert ServiceTargets.clip_flops == StoredTargets.clip_flops == ReservedTargets.clip_flops == 0, (
        "computed elsewhere"
    )


def test_a_teacher_of_others_counts_two_products_of_each_weight_and_token():
    timm = open_encoder(
        FrozenConfig(
            ckpt="timm-random:vit_tiny_patch16_224", num_frames=2, crop_size=32, patch_size=16, tubelet_size=2
        )
    )
    teacher = Teacher(timm, TeacherComputeConfig(batch_size=1), CPU)
    assert teacher.clip_flops == FORWARD_FLOPS * teacher.spec.num_parameters * 4


def test_measuring_the_peak_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    assert 1e8 < matrix_peak(CPU, "auto") < 1e13
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_and_biases_gets_every_line_of_a_run_and_of_its_continuation(out, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small_run(TeacherRun, out=str(out), wandb="salt", log_every=5, pictures_every=5)
    train_on_random_clips(config)
    identity = (out / "wandb_id").read_text().strip()
    [written] = out.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb")
    losses = [json.dumps(line["loss"]).encode() for line in read_metrics(out)]
    assert len(losses) == 2
    wait_until(
        lambda: all(loss in written.read_bytes() for loss in losses)
    )  # its own process writes the file
    assert b"loss/loss" in written.read_bytes()
    pictures = list(written.parent.glob("files/media/images/pictures/mask_set_*.png"))
    assert len(pictures) == 2 * len(config.mask.sets)
    train_on_random_clips(config)
    assert (out / "wandb_id").read_text().strip() == identity, "a continuation is the same run there"
