"""Encoder, predictor, pixel targets and objectives: what must hold. The numbers of the paper and of V-JEPA
2's code are in test_fidelity.py."""

import numpy as np
import pytest
import torch
from einops import rearrange

from salt_distill.common.config import (
    MASKS,
    PRESETS,
    EmaConfig,
    EncoderConfig,
    MaskConfig,
    PredictorConfig,
    TeacherRun,
    ViewConfig,
    mask_layer,
    preset_layer,
)
from salt_distill.common.model.grid import TokenGrid, grid_of, token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.pixels import normalise, pixel_targets
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.rope import rope_table, rotate
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.student_trainer.objective import Objective, new_objective
from salt_distill.student_trainer.salt import Salt
from salt_distill.student_trainer.vjepa import VJepa
from salt_distill.student_trainer.vpixel import VPixel, pixel_width

ENCODER = EncoderConfig(width=24, depth=2, num_heads=2, mlp_width=48, patch_size=8)
PREDICTOR = PredictorConfig(width=12, depth=2, num_heads=1, mlp_width=24)
VIEW = ViewConfig(num_frames=4, frame_step=1, crop_size=32)
GRID = token_grid(VIEW, ENCODER)


def new_encoder(config: EncoderConfig = ENCODER) -> Encoder:
    encoder = Encoder(config)
    init_weights(encoder, torch.Generator().manual_seed(0), std=0.02)
    return encoder


def new_predictor(out_width: int, num_sets: int = 2) -> Predictor:
    predictor = Predictor(
        PREDICTOR,
        in_width=ENCODER.width,
        out_width=out_width,
        num_mask_tokens=num_sets,
        rope=ENCODER.rope,
        norm_eps=1e-6,
    )
    predictor.init_weights(torch.Generator().manual_seed(1), std=0.02)
    return predictor


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# --- rotary positions ---


def test_rope_leaves_the_channels_over_as_they_are():
    x = torch.randn(GRID.num_tokens, 64)
    turned = rotate(x, rope_table(GRID, 64, "vjepa2_tiled", torch.device("cpu")))
    assert torch.equal(turned[:, 60:], x[:, 60:])
    assert not torch.equal(turned[:, :60], x[:, :60])


@pytest.mark.parametrize("grid", [TokenGrid(8, 14, 14), TokenGrid(3, 5, 7)], ids=str)
@pytest.mark.parametrize("head_width", [24, 32, 64, 80, 88, 104])
def test_rope_reads_positions_from_the_true_grid(grid, head_width):
    table = rope_table(grid, head_width, "vjepa2_tiled", torch.device("cpu"))
    token = grid.num_tokens - 2
    t, h, w = token // (grid.h * grid.w), token // grid.w % grid.h, token % grid.w
    half = head_width // 3 // 2  # 64 -> 10 frequencies on each of 20, 20, 20 channels, 4 left
    angles = [
        position * 10_000 ** (-(channel % half) / half)
        for position in (t, h, w)
        for channel in range(2 * half)
    ]
    angles += [0.0] * (head_width - 6 * half)
    signs = np.resize([-1, 1], head_width)  # what an even channel's neighbour gets
    torch.testing.assert_close(
        table[:, token],
        torch.tensor(np.array([np.cos(angles), np.sin(angles) * signs], np.float32)),
        rtol=0,
        atol=1e-5,
    )


def test_a_head_without_a_channel_for_each_axis_is_an_error():
    EncoderConfig(width=24, num_heads=4)
    with pytest.raises(ValueError, match="encoder: got a head width of 5, expected an even one"):
        EncoderConfig(width=20, num_heads=4)
    with pytest.raises(ValueError, match="encoder: got a head width of 4, expected at least 6"):
        EncoderConfig(width=16, num_heads=4)
    with pytest.raises(ValueError, match="predictor: got a head width of 4, expected at least 6"):
        PredictorConfig(width=16, num_heads=4)


def test_interleaved_rope_keeps_norms_and_depends_on_distances_alone():
    query, key = torch.randn(2, 1, 64)
    table = rope_table(TokenGrid(6, 1, 1), 64, "interleaved", torch.device("cpu"))
    torch.testing.assert_close(rotate(query, table[:, [5]]).norm(), query.norm())
    products = [(rotate(query, table[:, [t]]) * rotate(key, table[:, [t + 2]])).sum() for t in (1, 3)]
    torch.testing.assert_close(products[0], products[1], rtol=1e-4, atol=1e-4)


# --- encoder and predictor ---


def test_patch_embedding_is_a_convolution():
    encoder = new_encoder()
    torch.nn.init.normal_(encoder.patch_embed.bias)
    clip = torch.randn(2, 3, *VIEW.clip_shape[:3])
    size = ENCODER.tubelet_size, ENCODER.patch_size, ENCODER.patch_size
    convolution = torch.nn.Conv3d(3, ENCODER.width, size, stride=size)
    convolution.load_state_dict(
        {
            "weight": encoder.patch_embed.weight.reshape(ENCODER.width, 3, *size),
            "bias": encoder.patch_embed.bias,
        }
    )
    embedded = []
    encoder.patch_embed.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    encoder(clip)
    torch.testing.assert_close(
        embedded[0], rearrange(convolution(clip), "b e t h w -> b (t h w) e"), rtol=1e-4, atol=1e-5
    )


def test_naming_every_token_is_the_dense_forward():
    encoder, clip = new_encoder(), torch.randn(2, 3, *VIEW.clip_shape[:3])
    every = torch.arange(GRID.num_tokens).expand(2, -1)
    torch.testing.assert_close(encoder(clip, every), encoder(clip))


def test_order_of_named_tokens_does_not_matter():
    encoder, clip = new_encoder(), torch.randn(1, 3, *VIEW.clip_shape[:3])
    some = torch.tensor([[3, 8, 17, 30]])
    backwards = encoder(clip, some.flip(1))
    torch.testing.assert_close(backwards.flip(1), encoder(clip, some), rtol=1e-4, atol=1e-5)


def test_hidden_pixels_reach_no_visible_token():
    encoder, clip = new_encoder(), torch.randn(1, 3, *VIEW.clip_shape[:3])
    visible = torch.arange(GRID.num_tokens // 2)[None]  # the first of the two time steps
    other = clip.clone()
    other[:, :, ENCODER.tubelet_size :] = 7.0
    assert torch.equal(encoder(clip, visible), encoder(other, visible))
    assert not torch.equal(encoder(clip)[:, visible[0]], encoder(other)[:, visible[0]])


def test_clip_of_broken_cubes_is_an_error():
    with pytest.raises(ValueError, match="got clips of 4x30x32"):
        grid_of(torch.zeros(1, 3, 4, 30, 32), patch_size=8, tubelet_size=2)


@pytest.mark.parametrize("make", [new_encoder, lambda: new_predictor(24)], ids=["encoder", "predictor"])
def test_init_fills_every_parameter(make):
    module = make()
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    if isinstance(module, Predictor):
        module.init_weights(torch.Generator().manual_seed(0), std=0.02)
    else:
        init_weights(module, torch.Generator().manual_seed(0), std=0.02)
    assert [name for name, parameter in module.named_parameters() if parameter.isnan().any()] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_init_fills_every_parameter_of_a_presets_model(preset):
    run = TeacherRun.model_validate(preset_layer(TeacherRun, preset) | {"data": "", "out": "", "seed": 1})
    narrow = {"width": 6 * run.encoder.num_heads, "mlp_width": 32, "depth": 2}  # as the preset is, but small
    narrow_predictor = {"width": 6 * run.predictor.num_heads, "mlp_width": 32, "depth": 2}
    encoder, predictor = (
        run.encoder.model_copy(update=narrow),
        run.predictor.model_copy(update=narrow_predictor),
    )
    objective, _ = new_objective(run.model_copy(update={"encoder": encoder, "predictor": predictor}))
    for parameter in objective.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    init_weights(objective.encoder, torch.Generator().manual_seed(0), std=run.init_std)
    objective.predictor.init_weights(torch.Generator().manual_seed(0), std=run.init_std)
    assert [name for name, parameter in objective.named_parameters() if parameter.isnan().any()] == []


def test_init_shrinks_the_ends_of_deeper_blocks():
    encoder = new_encoder(EncoderConfig(width=192, depth=3, num_heads=4, mlp_width=768, patch_size=8))
    spreads = [(block.attn.w_out.weight.std(), block.mlp.w_down.weight.std()) for block in encoder.blocks]
    for number, block_spreads in enumerate(spreads, start=1):  # V-JEPA 2 measures .0142, .0099, .0081...
        for spread in block_spreads:
            assert spread.item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.03)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("objective", ["vpixel", "salt", "vjepa"])
def test_every_parameter_learns(objective, mask):
    config = MaskConfig.model_validate(mask_layer(mask)["mask"])
    model: Objective
    if objective == "vpixel":
        model = VPixel(
            new_encoder(), new_predictor(pixel_width(ENCODER), len(config.sets)), pixel_norm="channel"
        )
    elif objective == "salt":
        model = Salt(new_encoder(), new_predictor(20, len(config.sets)))
    else:
        model = VJepa(new_encoder(), new_predictor(ENCODER.width, len(config.sets)), ema=EmaConfig())
    target = (torch.randn(3, GRID.num_tokens, 20),) if objective == "salt" else ()
    torch.nn.init.normal_(model.predictor.mask_tokens)
    losses = model(
        random_pixels(3, *VIEW.clip_shape),
        mask_group(config, GRID, seed=0, step=0, group=0, batch_size=3),
        *target,
    )
    assert losses.shape == (len(config.sets), 3)
    losses.mean().backward()
    learning = {name: p for name, p in model.named_parameters() if not name.startswith("target_encoder")}
    assert [name for name, p in learning.items() if p.grad is None or not p.grad.any()] == []
    assert [
        name
        for name, p in model.named_parameters()
        if name not in learning and (p.requires_grad or p.grad is not None)
    ] == []
    assert model.predictor.mask_tokens.grad.any(1).all()  # each mask set has its own


def test_salt_loss_is_the_mean_distance_over_hidden_tokens():
    model = Salt(new_encoder(), new_predictor(20))
    torch.nn.init.zeros_(
        model.predictor.head.weight
    )  # the prediction is 0, so the loss is the target's mean size
    target = torch.randn(3, GRID.num_tokens, 20)
    group = mask_group(MaskConfig(), GRID, seed=0, step=0, group=0, batch_size=3)
    losses = model(random_pixels(3, *VIEW.clip_shape), group, target)
    for set_idx, mask_set in enumerate(group.sets):
        for row in range(3):
            torch.testing.assert_close(
                losses[set_idx, row], target[row, mask_set.hidden_idx[row]].abs().mean()
            )


# --- pixels ---


def test_normalised_pixels_use_the_mean_and_deviation_of_imagenet():
    clip = normalise(torch.tensor([0, 128, 255], dtype=torch.uint8).expand(1, 2, 8, 8, 3))
    assert clip.shape == (1, 3, 2, 8, 8)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(clip[0, :, 1, 3, 5], torch.tensor(expected))


def test_channels_of_a_cube_are_normalised_one_by_one():
    pixels = random_pixels(2, 4, 32, 32, 3)
    every = torch.arange(2 * 2 * 2).expand(2, -1)
    targets = pixel_targets(pixels, every, patch_size=16, tubelet_size=2, norm="channel").unflatten(
        -1, (-1, 3)
    )
    assert targets.mean(-2).abs().max() < 1e-5
    torch.testing.assert_close(targets.var(-2), torch.ones(2, 8, 3), rtol=1e-4, atol=0)


def test_a_flat_cube_gives_zeros():
    pixels = torch.full((1, 2, 16, 16, 3), 200, dtype=torch.uint8)
    targets = pixel_targets(
        pixels, torch.zeros(1, 1, dtype=torch.int64), patch_size=16, tubelet_size=2, norm="channel"
    )
    assert targets.abs().max() == 0


def test_joint_norm_is_of_the_pixels_that_the_model_sees():  # MAE's loader normalises before its loss does
    pixels = random_pixels(1, 2, 16, 16, 3)
    one = torch.zeros(1, 1, dtype=torch.int64)
    seen = normalise(pixels)[0].permute(1, 2, 3, 0).flatten()
    torch.testing.assert_close(
        pixel_targets(pixels, one, patch_size=16, tubelet_size=2, norm="joint")[0, 0],
        (seen - seen.mean()) / (seen.var() + 1e-6).sqrt(),
    )


def test_joint_norm_keeps_the_difference_between_channels():
    pixels = random_pixels(1, 2, 16, 16, 3) // 4
    pixels[..., 0] += 150
    one = torch.zeros(1, 1, dtype=torch.int64)
    means = {
        norm: pixel_targets(pixels, one, patch_size=16, tubelet_size=2, norm=norm)
        .unflatten(-1, (-1, 3))
        .mean(-2)
        .flatten()
        for norm in ("channel", "joint")
    }
    assert means["channel"].abs().max() < 1e-4
    assert means["joint"][0] > 1
