"""Encoder, predictor, masks and pixel targets: what must hold. The numbers of the paper and of V-JEPA 2's code are in test_fidelity.py."""

import numpy as np
import pytest
import torch
from einops import rearrange

from common.config import BlockSetConfig, EncoderConfig, MaskConfig, PredictorConfig, ViewConfig
from common.model.grid import TokenGrid, grid_of, token_grid
from common.model.masking import group_idx, mask_group
from common.model.pixels import normalise, pixel_targets
from common.model.predictor import Predictor
from common.model.rope import rope_table, rotate
from common.model.vit import Encoder, init_weights
from student_trainer.salt import Salt
from student_trainer.vpixel import VPixel, pixel_width

PAPER_GRID = TokenGrid(8, 14, 14)
ENCODER = EncoderConfig(width=24, depth=2, num_heads=2, mlp_width=48, patch_size=8)
PREDICTOR = PredictorConfig(width=12, depth=2, num_heads=1, mlp_width=24)
VIEW = ViewConfig(num_frames=4, frame_step=1, crop_size=32)
GRID = token_grid(VIEW, ENCODER)


def new_encoder(config: EncoderConfig = ENCODER) -> Encoder:
    encoder = Encoder(config)
    init_weights(encoder, torch.Generator().manual_seed(0), std=0.02)
    return encoder


def new_predictor(out_width: int) -> Predictor:
    predictor = Predictor(PREDICTOR, in_width=ENCODER.width, out_width=out_width, num_mask_tokens=2, rope=ENCODER.rope, norm_eps=1e-6)
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
    convolution.load_state_dict({"weight": encoder.patch_embed.weight.reshape(ENCODER.width, 3, *size), "bias": encoder.patch_embed.bias})
    embedded = []
    encoder.patch_embed.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    encoder(clip)
    torch.testing.assert_close(embedded[0], rearrange(convolution(clip), "b e t h w -> b (t h w) e"), rtol=1e-4, atol=1e-5)


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


def test_init_shrinks_the_ends_of_deeper_blocks():
    encoder = new_encoder(EncoderConfig(width=192, depth=3, num_heads=4, mlp_width=768, patch_size=8))
    spreads = [(block.attn.w_out.weight.std(), block.mlp.w_down.weight.std()) for block in encoder.blocks]
    for number, block_spreads in enumerate(spreads, start=1):  # V-JEPA 2 measures .0142, .0099, .0081...
        for spread in block_spreads:
            assert spread.item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.03)


@pytest.mark.parametrize("objective", ["vpixel", "salt"])
def test_every_parameter_learns(objective):
    target = None
    if objective == "vpixel":
        model = VPixel(new_encoder(), new_predictor(pixel_width(ENCODER)), pixel_norm="channel")
    else:
        model = Salt(new_encoder(), new_predictor(20))
        target = torch.randn(3, GRID.num_tokens, 20)
    torch.nn.init.normal_(model.predictor.mask_tokens)
    masks = mask_group(MaskConfig(), GRID, seed=0, step=0, group=0, batch_size=3)
    losses = model(random_pixels(3, *VIEW.clip_shape), target, masks)
    assert losses.shape == (2, 3)
    losses.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.predictor.mask_tokens.grad.any(1).all()  # each mask set has its own


def test_salt_loss_is_the_mean_distance_over_hidden_tokens():
    model = Salt(new_encoder(), new_predictor(20))
    torch.nn.init.zeros_(model.predictor.head.weight)  # the prediction is 0, so the loss is the target's mean size
    target = torch.randn(3, GRID.num_tokens, 20)
    group = mask_group(MaskConfig(), GRID, seed=0, step=0, group=0, batch_size=3)
    losses = model(random_pixels(3, *VIEW.clip_shape), target, group)
    for set_idx, mask_set in enumerate(group.sets):
        for row in range(3):
            torch.testing.assert_close(losses[set_idx, row], target[row, mask_set.hidden_idx[row]].abs().mean())


# --- pixels ---


def test_normalised_pixels_use_the_mean_and_deviation_of_imagenet():
    clip = normalise(torch.tensor([0, 128, 255], dtype=torch.uint8).expand(1, 2, 8, 8, 3))
    assert clip.shape == (1, 3, 2, 8, 8)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(clip[0, :, 1, 3, 5], torch.tensor(expected))


def test_channels_of_a_cube_are_normalised_one_by_one():
    pixels = random_pixels(2, 4, 32, 32, 3)
    every = torch.arange(2 * 2 * 2).expand(2, -1)
    targets = pixel_targets(pixels, every, patch_size=16, tubelet_size=2, norm="channel").unflatten(-1, (-1, 3))
    assert targets.mean(-2).abs().max() < 1e-5
    torch.testing.assert_close(targets.var(-2), torch.ones(2, 8, 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", ["channel", "joint"])
def test_a_flat_cube_gives_zeros(norm):
    pixels = torch.full((1, 2, 16, 16, 3), 200, dtype=torch.uint8)
    targets = pixel_targets(pixels, torch.zeros(1, 1, dtype=torch.int64), patch_size=16, tubelet_size=2, norm=norm)
    torch.testing.assert_close(targets, torch.zeros_like(targets), rtol=0, atol=1e-3)


def test_joint_norm_keeps_the_difference_between_channels():
    pixels = random_pixels(1, 2, 16, 16, 3) // 4
    pixels[..., 0] += 150
    one = torch.zeros(1, 1, dtype=torch.int64)
    means = {
        norm: pixel_targets(pixels, one, patch_size=16, tubelet_size=2, norm=norm).unflatten(-1, (-1, 3)).mean(-2).flatten()
        for norm in ("channel", "joint")
    }
    assert means["channel"].abs().max() < 1e-4
    assert means["joint"][0] > 1


# --- masks ---


@pytest.mark.parametrize("truncate", ["first", "random"])
def test_visible_and_hidden_are_disjoint_and_ascend(truncate):
    group = mask_group(MaskConfig(truncate=truncate), PAPER_GRID, seed=0, step=3, group=1, batch_size=40)
    assert (group.first, group.size) == (24, 16)
    for mask_set in group.sets:
        for idx in (mask_set.visible_idx, mask_set.hidden_idx):
            assert len(idx) == 16
            assert idx.shape[1] > 0
            assert (idx.diff(dim=1) > 0).all()
            assert 0 <= idx.min() <= idx.max() < PAPER_GRID.num_tokens
        for visible, hidden in zip(mask_set.visible_idx.tolist(), mask_set.hidden_idx.tolist(), strict=True):
            assert not set(visible) & set(hidden)


@pytest.mark.parametrize("truncate", ["first", "random"])
def test_visible_and_hidden_cover_the_grid_where_nothing_is_cut(truncate):
    group = mask_group(MaskConfig(truncate=truncate), PAPER_GRID, seed=0, step=3, group=0, batch_size=1)
    for mask_set in group.sets:
        together = torch.cat((mask_set.visible_idx[0], mask_set.hidden_idx[0])).sort().values
        assert torch.equal(together, torch.arange(PAPER_GRID.num_tokens))


def test_masks_depend_on_seed_step_and_position_alone():
    def sets(**changed):
        return mask_group(MaskConfig(), PAPER_GRID, **{"seed": 0, "step": 5, "group": 0, "batch_size": 24, **changed}).sets

    def same(first, second):
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(first, second, strict=True) for name in ("visible_idx", "hidden_idx")]
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    first = sets()
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(first, sets())
    assert same(first, sets(batch_size=72))  # later groups of the batch change nothing
    assert not same(first, sets(step=6))
    assert not same(first, sets(seed=1))
    assert not same(first, sets(batch_size=72, group=1))


def test_first_keeps_early_tokens_and_random_keeps_as_many_from_everywhere():
    kept = {
        truncate: mask_group(MaskConfig(truncate=truncate), PAPER_GRID, seed=0, step=0, group=0, batch_size=24).sets
        for truncate in ("first", "random")
    }
    for first, random in zip(kept["first"], kept["random"], strict=True):
        assert first.visible_idx.shape == random.visible_idx.shape
        assert first.hidden_idx.shape == random.hidden_idx.shape
        assert first.hidden_idx.double().mean() < random.hidden_idx.double().mean()


def test_masks_that_leave_nothing_visible_are_an_error():
    config = MaskConfig(sets=(BlockSetConfig(num_blocks=1, area_fraction=1.0, aspect_ratio=(1.0, 1.0)),))
    with pytest.raises(ValueError, match="expected blocks that leave tokens visible"):
        mask_group(config, TokenGrid(2, 4, 4), seed=0, step=0, group=0, batch_size=1)


def test_a_group_outside_the_batch_is_an_error():
    with pytest.raises(ValueError, match="got mask group 2 of a batch of 48, expected at most 1"):
        mask_group(MaskConfig(), GRID, seed=0, step=0, group=2, batch_size=48)


@pytest.mark.parametrize(("batch_size", "world_size"), [(24, 1), (100, 3), (3072, 7), (30, 2)])
def test_every_mask_group_has_one_rank(batch_size, world_size):
    taken = [group for rank in range(world_size) for group in group_idx(batch_size, rank, world_size)]
    assert taken == list(range(-(-batch_size // 24)))
