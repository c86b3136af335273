"""The report's pictures: masks partition the clip, and a reconstruction is put back where it belongs."""

import numpy as np
import pytest
import torch
from eval_tools import CONFIG, make_models

from salt_distill.common.model.pixels import pixel_targets
from salt_distill.common.pictures import (
    CONTEXT,
    DROPPED,
    DROPPED_COLOUR,
    GAP,
    STRIP_HEIGHT,
    TARGET,
    spread_over_pixels,
    strip,
    tint_masks,
    token_roles,
)
from salt_distill.student_trainer.evaluation import reconstruction


@pytest.fixture
def clip():
    return np.random.default_rng(0).integers(0, 256, CONFIG.view.clip_shape, dtype=np.uint8)


@pytest.fixture
def masks():
    return reconstruction.masks_of(CONFIG, seed=0, step=7, batch_size=5)


def test_masks_partition_the_grid(clip, masks):
    for mask in masks.sets:
        for row in range(masks.size):
            roles = token_roles(mask, row, CONFIG.grid.num_tokens)
            counts = np.bincount(roles, minlength=3)
            assert counts[CONTEXT] == mask.visible_idx.shape[1]
            assert counts[TARGET] == mask.hidden_idx.shape[1]
            assert counts.sum() == CONFIG.grid.num_tokens


def test_the_overlay_leaves_exactly_the_context_as_it_is(clip, masks):
    roles = token_roles(masks.sets[0], 1, CONFIG.grid.num_tokens)
    tinted = tint_masks(clip, roles, CONFIG.grid)
    for token in range(CONFIG.grid.num_tokens):
        t, h, w = np.unravel_index(token, CONFIG.grid)
        cube = np.s_[2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
        assert np.array_equal(tinted[cube], clip[cube]) == (roles[token] == CONTEXT)


@pytest.mark.parametrize("norm", ["channel", "joint"])
def test_a_perfect_prediction_gives_the_clip_back(clip, masks, norm):
    """With the true normalised pixels as the prediction, undoing the normalisation has to return the input,
    cube by cube."""
    mask = masks.sets[0]
    encoder, _ = make_models()

    def oracle(visible, visible_idx, hidden_idx, *, grid, mask_set):
        return pixel_targets(
            torch.from_numpy(clip)[None], hidden_idx, patch_size=8, tubelet_size=2, norm=norm
        )

    made = reconstruction.reconstruct(
        clip, mask, 1, 0, encoder=encoder, predictor=oracle, config=CONFIG, pixel_norm=norm
    )
    roles = token_roles(mask, 1, CONFIG.grid.num_tokens)
    shown = spread_over_pixels(roles, CONFIG.grid, clip.shape[:3])
    assert (roles == DROPPED).any()
    assert np.array_equal(made.prediction[shown != DROPPED], clip[shown != DROPPED])
    assert (made.prediction[shown == DROPPED] == DROPPED_COLOUR).all()
    assert np.array_equal(made.visible[shown == CONTEXT], clip[shown == CONTEXT])
    assert (made.visible[shown != CONTEXT] == DROPPED_COLOUR).all()


def test_a_real_model_paints_only_hidden_cubes(clip, masks):
    encoder, predictor = make_models()
    made = reconstruction.reconstruct(
        clip, masks.sets[1], 0, 1, encoder=encoder, predictor=predictor, config=CONFIG, pixel_norm="channel"
    )
    roles = spread_over_pixels(
        token_roles(masks.sets[1], 0, CONFIG.grid.num_tokens), CONFIG.grid, clip.shape[:3]
    )
    assert np.array_equal(made.prediction[roles == CONTEXT], clip[roles == CONTEXT])
    assert not np.array_equal(made.prediction[roles == TARGET], clip[roles == TARGET])


def test_a_strip_shows_the_first_frame_of_each_tubelet(clip):
    shown = strip(clip, 2)
    factor = shown.shape[0] // 32
    assert shown.shape == (32 * factor, 2 * 32 * factor + GAP, 4)
    assert shown.shape[0] >= STRIP_HEIGHT
    assert np.array_equal(shown[::factor, : 32 * factor : factor, :3], clip[0])
    assert np.array_equal(shown[::factor, 32 * factor + GAP :: factor, :3], clip[2])
    assert (shown[:, 32 * factor : 32 * factor + GAP, 3] == 0).all()
