"""The contract that every masking strategy keeps. The numbers of V-JEPA 2's multi-block masks are in
test_fidelity.py."""

import hashlib

import numpy as np
import pytest
import torch

from salt_distill.common.config import MASKS, BlockSetConfig, MaskConfig, TubeSetConfig, mask_layer
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.masking import block_size, group_idx, mask_group

PAPER_GRID = TokenGrid(8, 14, 14)
NUM_PLACES = 14 * 14


def config_of(name: str, **values) -> MaskConfig:
    return MaskConfig.model_validate(mask_layer(name)["mask"] | values)


def test_random_keeps_all_time_steps_alike():
    groups = [
        mask_group(MaskConfig(truncate="random"), PAPER_GRID, seed=0, step=step, group=0, batch_size=24)
        for step in range(10)
    ]
    for set_idx in range(2):
        for name in ("visible_idx", "hidden_idx"):
            t_idx = (
                torch.cat([getattr(group.sets[set_idx], name).flatten() for group in groups]) // NUM_PLACES
            )
            mean = np.bincount(t_idx, minlength=8) / (24 * len(groups))
            np.testing.assert_allclose(mean, np.full(8, mean.mean()), atol=5)


def test_masks_are_the_same_bits_as_ever():
    digests = {
        ("first", PAPER_GRID): "7527ebfa30798c88",
        ("first", TokenGrid(4, 4, 4)): "aa33b3c0ad8f1039",
        ("random", TokenGrid(16, 16, 16)): "af59318bc979d135",
    }  # of the first version, a loop over clips and blocks
    for (truncate, grid), digest in digests.items():
        hasher = hashlib.sha256()
        for step, group in np.ndindex(3, 3):
            for mask in mask_group(
                MaskConfig(truncate=truncate), grid, seed=7, step=step, group=group, batch_size=60
            ).sets:
                for idx in (mask.visible_idx, mask.hidden_idx):
                    hasher.update(repr(tuple(idx.shape)).encode() + idx.numpy().astype("<i8").tobytes())
        assert hasher.hexdigest()[:16] == digest, (truncate, grid)


@pytest.mark.parametrize("grid", [PAPER_GRID, TokenGrid(4, 4, 4), TokenGrid(2, 7, 5)], ids=str)
@pytest.mark.parametrize("truncate", ["first", "random"])
@pytest.mark.parametrize("strategy", MASKS)
def test_visible_and_hidden_are_disjoint_and_ascend(strategy, truncate, grid):
    group = mask_group(config_of(strategy, truncate=truncate), grid, seed=0, step=3, group=1, batch_size=40)
    assert (group.first, group.size) == (24, 16)
    for mask_set in group.sets:
        for idx in (mask_set.visible_idx, mask_set.hidden_idx):
            assert len(idx) == 16
            assert idx.shape[1] > 0
            assert (idx.diff(dim=1) > 0).all()
            assert 0 <= idx.min() <= idx.max() < grid.num_tokens
        for visible, hidden in zip(mask_set.visible_idx.tolist(), mask_set.hidden_idx.tolist(), strict=True):
            assert not set(visible) & set(hidden)


@pytest.mark.parametrize("truncate", ["first", "random"])
@pytest.mark.parametrize("strategy", MASKS)
def test_visible_and_hidden_cover_the_grid_where_nothing_is_cut(strategy, truncate):
    group = mask_group(
        config_of(strategy, truncate=truncate), PAPER_GRID, seed=0, step=3, group=0, batch_size=1
    )
    for mask_set in group.sets:
        together = torch.cat((mask_set.visible_idx[0], mask_set.hidden_idx[0])).sort().values
        assert torch.equal(together, torch.arange(PAPER_GRID.num_tokens))


@pytest.mark.parametrize("strategy", MASKS)
def test_masks_depend_on_seed_step_and_position_alone(strategy):
    def sets(**changed):
        return mask_group(
            config_of(strategy), PAPER_GRID, **{"seed": 0, "step": 5, "group": 0, "batch_size": 24, **changed}
        ).sets

    def same(first, second):
        pairs = [
            (getattr(a, name), getattr(b, name))
            for a, b in zip(first, second, strict=True)
            for name in ("visible_idx", "hidden_idx")
        ]
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    first = sets()
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(first, sets())
    assert same(first, sets(batch_size=72))  # later groups of the batch change nothing
    assert not same(first, sets(step=6))
    assert not same(first, sets(seed=1))
    assert not same(first, sets(batch_size=72, group=1))


def test_random_keeps_as_many_tokens_as_first():
    first, random = (
        mask_group(MaskConfig(truncate=truncate), PAPER_GRID, seed=0, step=0, group=0, batch_size=24).sets
        for truncate in ("first", "random")
    )
    for a, b in zip(first, random, strict=True):
        assert (a.visible_idx.shape, a.hidden_idx.shape) == (b.visible_idx.shape, b.hidden_idx.shape)


# --- the other strategies ---


@pytest.mark.parametrize(("max_temporal_keep", "first_hidden"), [(0.75, 6), (0.375, 3), (0.1, 1), (0.99, 7)])
def test_causal_blocks_hide_every_late_time_step(max_temporal_keep, first_hidden):
    blocks = BlockSetConfig(num_blocks=2, area_fraction=0.3, max_temporal_keep=max_temporal_keep)
    causal, plain = (
        mask_group(MaskConfig(sets=(mask_set,)), PAPER_GRID, seed=0, step=0, group=0, batch_size=1).sets[0]
        for mask_set in (blocks, blocks.model_copy(update={"max_temporal_keep": 1.0}))
    )
    assert torch.equal(
        causal.visible_idx, plain.visible_idx[:, plain.visible_idx[0] < first_hidden * NUM_PLACES]
    )
    late = torch.arange(first_hidden * NUM_PLACES, PAPER_GRID.num_tokens)
    assert torch.isin(late, causal.hidden_idx).all()


def test_random_tubes_hide_videomaes_number_of_places_in_every_time_step():
    (mask,) = mask_group(config_of("random-tube"), PAPER_GRID, seed=0, step=0, group=0, batch_size=24).sets
    assert mask.visible_idx.shape == (24, 160)  # of 1568 tokens; 176 of 196 places hidden
    places = mask.visible_idx.reshape(24, 8, 20) - torch.arange(8)[:, None] * NUM_PLACES
    assert torch.equal(places, places[:, :1].expand_as(places))
    assert len({tuple(row) for row in places[:, 0].tolist()}) == 24  # clips differ


def test_random_tubes_hide_every_place_equally_often():
    steps = [
        mask_group(config_of("random-tube"), PAPER_GRID, seed=0, step=step, group=0, batch_size=24).sets[0]
        for step in range(100)
    ]
    seen = np.bincount(
        torch.cat([mask.visible_idx.flatten() for mask in steps]), minlength=PAPER_GRID.num_tokens
    )[:NUM_PLACES]
    expected = 2400 * 20 / NUM_PLACES
    assert abs(seen - expected).max() < 5 * expected**0.5


def test_multi_random_tube_shows_what_multi_block_keeps():
    short, long = mask_group(
        config_of("multi-random-tube"), PAPER_GRID, seed=0, step=0, group=0, batch_size=24
    ).sets
    assert short.visible_idx.shape[1] / PAPER_GRID.num_tokens == pytest.approx(0.234, abs=0.5 / NUM_PLACES)
    assert long.visible_idx.shape[1] / PAPER_GRID.num_tokens == pytest.approx(0.068, abs=0.5 / NUM_PLACES)
    assert set(short.visible_idx[0].tolist()) & set(
        long.hidden_idx[0].tolist()
    )  # each set has its own places


def test_hidden_by_any_is_the_union_of_the_sets():
    group = mask_group(MaskConfig(), PAPER_GRID, seed=0, step=3, group=0, batch_size=24)
    found = group.hidden_by_any(PAPER_GRID.num_tokens)
    assert len(found) == 24
    for row, token_idx in enumerate(found):
        assert token_idx.tolist() == sorted(
            set().union(*(mask.hidden_idx[row].tolist() for mask in group.sets))
        )


def test_masks_that_leave_nothing_visible_or_hidden_are_an_error():
    everything = MaskConfig(sets=(BlockSetConfig(num_blocks=1, area_fraction=1.0, aspect_ratio=(1.0, 1.0)),))
    with pytest.raises(ValueError, match="expected blocks that leave tokens visible"):
        mask_group(everything, TokenGrid(2, 4, 4), seed=0, step=0, group=0, batch_size=1)
    with pytest.raises(
        ValueError, match=r"got hidden_fraction=0.05 of 16 places, expected at least one hidden place"
    ):
        mask_group(
            MaskConfig(sets=(TubeSetConfig(hidden_fraction=0.05),)),
            TokenGrid(2, 4, 4),
            seed=0,
            step=0,
            group=0,
            batch_size=1,
        )


def test_a_group_outside_the_batch_is_an_error():
    with pytest.raises(ValueError, match="got mask group 2 of a batch of 48, expected at most 1"):
        mask_group(MaskConfig(), PAPER_GRID, seed=0, step=0, group=2, batch_size=48)


@pytest.mark.parametrize(("batch_size", "world_size"), [(24, 1), (100, 3), (3072, 7), (30, 2)])
def test_every_mask_group_has_one_rank(batch_size, world_size):
    taken = [group for rank in range(world_size) for group in group_idx(batch_size, rank, world_size)]
    assert taken == list(range(-(-batch_size // 24)))


@pytest.mark.parametrize(
    ("grid", "short", "long"),
    [
        ((4, 6), [(2, 1), (2, 2)], [(3, 5), (4, 3), (4, 4), (4, 5)]),
        ((6, 4), [(2, 1), (2, 2)], [(3, 4), (4, 4), (5, 3), (5, 4)]),
        ((9, 16), [(4, 5), (5, 4), (5, 5), (6, 4)], [(9, 8), (9, 9), (9, 10), (9, 11), (9, 12)]),
    ],
)
def test_blocks_of_wide_and_high_grids_are_the_references(grid, short, long):
    """All that V-JEPA 2's generator gives for seeds 0 to 1999: each side is cut to its own of the grid."""
    for mask_set, expected in zip(MaskConfig().sets, (short, long), strict=True):
        assert isinstance(mask_set, BlockSetConfig)
        sizes = {block_size(seed, TokenGrid(2, *grid), mask_set)[1:] for seed in range(2000)}
        assert sorted(sizes) == expected
