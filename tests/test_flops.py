"""Compute: the exact count against torch's own counter on real steps, 6ND by hand, and `salt-eval flops`."""

import json

import numpy as np
import pytest
import torch
from teacher_tools import ENCODER as TEACHER
from teacher_tools import VIEW, load_teacher
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from salt_distill.common.config import (
    EncoderConfig,
    FlopsConfig,
    MaskConfig,
    PredictorConfig,
    StudentRun,
    TeacherRun,
    ViewConfig,
    VJepaRun,
    preset_layer,
)
from salt_distill.common.model.flops import KeptTokens, encoder_forward, exact_flops, kept_tokens, step_flops
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.vit import Encoder
from salt_distill.student_trainer.evaluation.flops_table import run, runs_of
from salt_distill.student_trainer.objective import new_objective

ENCODER = EncoderConfig(width=36, depth=2, num_heads=3, mlp_width=100, patch_size=8)
PREDICTOR = PredictorConfig(width=24, depth=3, num_heads=2, mlp_width=60)
CLIP = ViewConfig(num_frames=8, frame_step=1, crop_size=48)
GRID = token_grid(CLIP, ENCODER)
RUN = {
    "data": "no-such-data",
    "out": "no-such-run",
    "steps": 50,
    "workers": 0,
    "encoder": ENCODER,
    "predictor": PREDICTOR,
    "view": CLIP,
    "optim": {"warmup_steps": 5},
    "batch_size": 5,
}
RUNS = {
    "vpixel": TeacherRun.model_validate(RUN),
    "salt": StudentRun.model_validate(RUN | {"teacher_ckpt": "no-such-teacher"}),
    "vjepa": VJepaRun.model_validate(RUN),
}


@pytest.mark.parametrize("objective", RUNS)
def test_the_exact_count_is_what_torch_counts_in_a_step(objective, tmp_path):
    """Matrix products of linear maps and attention, forward and backward; torch counts nothing else either:
    no norm, GELU, softmax, RoPE or loss.

    Attention as two matrix products: a fused backward computes the scores a second time, and torch counts
    that.
    """
    config = RUNS[objective]
    spec = load_teacher(tmp_path).spec if objective == "salt" else None
    if spec is not None:  # a teacher of another width with the student's token grid
        spec = type(spec).from_json(spec.to_json() | {"grid": tuple(GRID), "clip_shape": CLIP.clip_shape})
    model, checkpoint = new_objective(config, [] if spec is None else [spec])
    masks = mask_group(MaskConfig(), GRID, seed=0, step=1, group=0, batch_size=5)
    pixels = torch.randint(0, 256, (5, *CLIP.clip_shape), dtype=torch.uint8)
    target = () if spec is None else (torch.randn(5, GRID.num_tokens, spec.width),)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pixels, masks, *target).mean().backward()
    expected = exact_flops(
        [KeptTokens.of(masks)],
        num_tokens=GRID.num_tokens,
        encoder=ENCODER,
        predictor=PREDICTOR,
        out_width=sum(checkpoint.predictor_out_width),
        teacher=ENCODER if objective == "vjepa" else None,
    )
    assert 5 * expected.total == counter.get_total_flops()


def test_the_exact_count_of_a_teachers_forward_is_torchs():
    encoder, pixels = Encoder(TEACHER), torch.zeros(3, *VIEW.clip_shape, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        encoder(normalise(pixels))
    assert (
        3 * encoder_forward(TEACHER, token_grid(VIEW, TEACHER).num_tokens).total == counter.get_total_flops()
    )


def test_attention_is_what_grows_with_the_square_of_the_tokens():
    once, twice = encoder_forward(ENCODER, 50), encoder_forward(ENCODER, 100)
    assert (twice.linear, twice.attention) == (2 * once.linear, 4 * once.attention)
    assert once.attention == 2 * 2 * 50 * 50 * ENCODER.width * ENCODER.depth  # scores and values


def test_kept_tokens_are_the_masks_and_clips_weigh_equally():
    kept = kept_tokens(
        MaskConfig(), GRID, seed=3, batch_size=30, num_groups=4
    )  # a group of 24, and one of 6 that keeps more
    assert [group.num_clips for group in kept] == [24, 6, 24, 6]
    for number, group in enumerate(kept):
        masks = mask_group(MaskConfig(), GRID, seed=3, step=1 + number // 2, group=number % 2, batch_size=30)
        assert group.visible == tuple(s.visible_idx.shape[1] for s in masks.sets)
        assert group.hidden == tuple(s.hidden_idx.shape[1] for s in masks.sets)
    size = {
        "num_tokens": GRID.num_tokens,
        "encoder": ENCODER,
        "predictor": PREDICTOR,
        "out_width": 8,
        "teacher": None,
    }
    alone = [exact_flops([group], **size) for group in kept]
    together = exact_flops(kept, **size)
    for part in ("encoder", "predictor", "attention"):
        assert getattr(together, part) == pytest.approx(
            np.average([getattr(flops, part) for flops in alone], weights=[24, 6, 24, 6])
        )


def test_six_n_d_by_hand():
    flops = step_flops(
        num_clips=3,
        num_tokens=50,
        encoder_parameters=700,
        predictor_parameters=40,
        teacher_parameters=900,
        mask=MaskConfig(),
    )
    assert flops == pytest.approx(3 * 50 * (6 * 2 * 0.1 * 700 + 6 * 2 * 40 + 2 * 900))


def flops_of(preset: str, **values) -> FlopsConfig:
    return FlopsConfig.model_validate(preset_layer(FlopsConfig, preset) | values)


def test_a_chain_counts_every_run_that_made_the_teacher():
    chain = runs_of(flops_of("nano", teacher="nano", teacher_steps=[10, 20], steps=30))
    assert [(run.objective, run.steps, run.parameters["teacher"] > 0) for run in chain] == [
        ("vpixel", 10, False), ("salt", 20, True), ("salt", 30, True)
    ]  # fmt: skip
    assert chain[2].exact.total == pytest.approx(1.5 * chain[1].exact.total)
    assert chain[0].six_n_d.teacher == 0
    assert chain[0].out_width == 3 * 2 * 8 * 8


def test_flags_of_the_command_change_what_is_counted():
    base = runs_of(flops_of("nano", teacher="ema"))[0]
    assert base.parameters["teacher"] == base.parameters["encoder"]
    deeper = runs_of(
        flops_of("nano", teacher="ema", encoder=preset_layer(FlopsConfig, "nano")["encoder"] | {"depth": 8})
    )[0]
    assert deeper.six_n_d.encoder > 1.9 * base.six_n_d.encoder
    dense = runs_of(flops_of("nano", mask={"sets": [{"hidden_fraction": 0.5}]}))[
        0
    ]  # half of the places as tubes
    assert dense.shares == [(0.5, 0.5)]
    assert dense.tokens["predictor"] == dense.grid.num_tokens


@pytest.mark.parametrize(
    ("preset", "values", "sentence"),
    [
        (
            "vit-b",
            {"teacher": "vit-x"},
            "got teacher 'vit-x', expected ema, or the preset of a frozen teacher: vit-b",
        ),
        ("vit-b", {"teacher": "ema", "teacher_steps": [5]}, "expected --teacher PRESET with it"),
        ("vit-b", {"paper": True}, "got --paper with encoder, expected --paper alone"),
        ("vit-b", {"view": {"crop_size": 100}}, "expected multiples of"),
    ],
)
def test_what_means_nothing_is_refused(preset, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        flops_of(preset, **values)


def test_a_teacher_with_other_tokens_is_refused():
    with pytest.raises(
        ValueError,
        match="got a teacher nano with patches of 8 pixels and 2 frames, expected the student's 16 and 2",
    ):
        runs_of(flops_of("vit-b", teacher="nano"))


def test_the_command_prints_both_counts(capsys):
    example = {"teacher": "vit-l", "teacher_steps": [80_000], "steps": 160_000}
    run(flops_of("vit-g", json_=True, **example))
    found = json.loads(capsys.readouterr().out)
    stage_1, stage_2 = found["runs"]
    assert (stage_1["steps"], stage_2["steps"]) == (80_000, 160_000)
    assert stage_2["num_parameters"] == {
        "encoder": 1_012_173_952,
        "predictor": 22_230_400,
        "teacher": 303_885_312,
    }
    assert found["total"]["six_n_d"] == pytest.approx(1.854e21, rel=1e-3)  # Table 11: 1.9
    assert found["total"]["exact"] == stage_1["exact"]["total"] + stage_2["exact"]["total"]
    run(flops_of("vit-g", **example))
    text = capsys.readouterr().out
    assert "SALT, 160,000 steps" in text
    for flops in (stage_2["six_n_d"]["encoder"], stage_2["exact"]["encoder"], *found["total"].values()):
        assert f"{flops:.3e}".replace("e+", "e") in text


def test_the_papers_tables_on_the_terminal_and_for_programs(capsys):
    run(FlopsConfig(paper=True, json_=True))
    cells = {cell["cell"]: cell for cell in json.loads(capsys.readouterr().out)}
    salt_l = cells["Table 10: SALT-L/16, FLOPs (10^21)"]
    assert (salt_l["paper"], salt_l["holds"], salt_l["how"]) == ("1.2", True, "rounded")
    assert salt_l["ours"] == pytest.approx(1.196, abs=5e-4)
    run(FlopsConfig(paper=True))
    text = capsys.readouterr().out
    assert "1.8 / 1.853 (cut)" in text
    assert "Samples 7.4: 240,000 steps of 3072 clips are 0.737" in text
