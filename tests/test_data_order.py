"""Slot -> sample: every sample once a pass on any split of ranks, resuming anywhere, mixtures in their
proportions."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_distill.common.config import MASK_GROUP_SIZE
from salt_distill.common.data.order import Mixture, Order, interleave, shares_of
from salt_distill.common.model.masking import group_idx

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=8)
SOURCES = st.lists(SIZES, min_size=1, max_size=4).filter(lambda sources: any(map(any, sources)))


def mixture(
    sources: list[list[int]],
    weights: list[float] | None = None,
    *,
    data_seed: int = 0,
    shuffle_shards: int = 2,
) -> Mixture:
    sizes = [size for source in sources for size in source]
    of = [place for place, source in enumerate(sources) for _ in source]
    names = [f"source {place}" for place in range(len(sources))]
    return Mixture(sizes, of, names, weights, data_seed=data_seed, shuffle_shards=shuffle_shards)


def every_sample(sources: list[list[int]]) -> set[tuple[int, int]]:
    return {
        (shard, sample)
        for shard, size in enumerate(size for source in sources for size in source)
        for sample in range(size)
    }


# --- one pass ---


@given(SOURCES, st.integers(0, 3), st.integers(1, 5), st.integers(0, 2))
@settings(max_examples=80, deadline=None)
def test_a_pass_takes_every_sample_of_every_source_once(sources, data_seed, shuffle_shards, epoch):
    order = mixture(sources, data_seed=data_seed, shuffle_shards=shuffle_shards)
    located = [
        order.locate(slot) for slot in range(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    ]
    assert {number for number, _, _ in located} == {epoch}
    assert Counter(place[1:] for place in located) == Counter(every_sample(sources))


def slots_of(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """As ``Batches`` has them: whole mask groups."""
    groups = group_idx(batch_size, rank, world_size)
    first = (step - 1) * batch_size
    return range(
        first + MASK_GROUP_SIZE * groups.start, first + min(MASK_GROUP_SIZE * groups.stop, batch_size)
    )


@given(SOURCES, st.integers(1, 100), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_any_split_of_ranks_sees_the_same_sequence(sources, batch_size, world_size, num_steps):
    order = mixture(sources)
    alone = [order.locate(slot) for slot in range(num_steps * batch_size)]
    ranks = [mixture(sources) for _ in range(world_size)]  # a new one for each, as in processes of their own
    split = [
        ranks[rank].locate(slot)
        for step in range(1, num_steps + 1)
        for rank in range(world_size)
        for slot in slots_of(step, batch_size, rank, world_size)
    ]
    assert split == alone
    whole = num_steps * batch_size // order.num_samples  # passes that are over
    assert Counter(place[1:] for place in split[: whole * order.num_samples]) == Counter(
        dict.fromkeys(every_sample(sources), whole)
    )


@given(SOURCES, st.integers(1, 60), st.integers(2, 12), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_resuming_at_every_step_continues_the_sequence(
    sources, batch_size, num_steps, world_before, world_after
):
    whole = [mixture(sources).locate(slot) for slot in range(num_steps * batch_size)]

    def steps(order: Mixture, first: int, last: int, world_size: int) -> list:
        return [
            order.locate(slot)
            for step in range(first, last + 1)
            for rank in range(world_size)
            for slot in slots_of(step, batch_size, rank, world_size)
        ]

    for stopped in range(num_steps + 1):
        before = steps(mixture(sources), 1, stopped, world_before)
        after = steps(mixture(sources), stopped + 1, num_steps, world_after)
        assert before + after == whole


def test_an_order_needs_no_history_and_depends_on_the_data_seed():
    sizes, positions = [5, 0, 9, 3, 20], range(3 * 37)
    first = [Order(sizes, 0, 2).locate(position) for position in positions]  # a new one for each
    order = Order(sizes, 0, 2)
    assert [order.locate(position) for position in reversed(positions)] == first[::-1]
    assert [Order(sizes, 1, 2).locate(position) for position in positions] != first
    assert [place[1:] for place in first[:37]] != [place[1:] for place in first[37:74]]  # passes differ


def test_an_order_opens_few_shards_at_a_time():
    order = Order([4] * 12, 0, 3)
    for window in range(4):
        assert len({order.locate(position)[1] for position in range(12 * window, 12 * window + 12)}) == 3


def test_a_slot_far_away_costs_no_more():
    order = mixture([[40] * 50, [7] * 11])
    numbers = [order.locate(slot) for slot in (10**15, 10**15 + 1, 5)]
    assert numbers == [mixture([[40] * 50, [7] * 11]).locate(slot) for slot in (10**15, 10**15 + 1, 5)]
    assert numbers[0][0] == 10**15 // order.num_samples


def test_sources_of_one_shape_have_orders_of_their_own():
    order = mixture([[20] * 4, [20] * 4])
    places = [order.locate(slot)[1:] for slot in range(160)]
    first = [(shard, sample) for shard, sample in places if shard < 4]
    second = [(shard - 4, sample) for shard, sample in places if shard >= 4]
    assert sorted(first) == sorted(second)
    assert first != second
    alone = [Order([20] * 4, 0, 2, "source 1").locate(slot)[1:] for slot in range(80)]
    assert second == alone  # which no other source changes


# --- proportions ---

SHARES = st.lists(st.integers(0, 50), min_size=1, max_size=7).filter(any)


@given(SHARES, st.integers(0, 3))
@settings(max_examples=120, deadline=None)
def test_proportions_are_exact_over_a_cycle_and_near_at_every_slot(shares, cycle):
    total = sum(shares)
    taken = [cycle * share for share in shares]
    for slot in range(cycle * total, (cycle + 1) * total):
        source, position = interleave(shares, slot)
        assert position == taken[source]  # its slots are numbered without a gap
        taken[source] += 1
        for share, count in zip(shares, taken, strict=True):
            assert abs(count - Fraction((slot + 1) * share, total)) < len(shares)
    assert taken == [(cycle + 1) * share for share in shares]


def test_weights_are_taken_as_written():
    assert shares_of([0.335, 0.1, 0.565]) == [67, 20, 113]  # V-JEPA 2's, out of 200
    assert shares_of([1, 1]) == [1, 1]
    assert shares_of([0.1, 0.2]) == [1, 2]
    assert shares_of([1e-3, 2.5]) == [1, 2500]


def test_weighted_sources_pass_over_their_samples_at_their_own_pace():
    order = mixture([[3, 4], [10]], [0.75, 0.25])
    located = [order.locate(slot) for slot in range(400)]
    small = [place for place in located if place[1] < 2]
    assert len(small) == 300
    assert [number for number, _, _ in small] == [i // 7 for i in range(300)]
    large = [place for place in located if place[1] == 2]
    assert [number for number, _, _ in large] == [i // 10 for i in range(100)]
    for number in range(10):
        assert {place for _, _, place in large[10 * number : 10 * number + 10]} == set(range(10))


def test_a_source_without_a_sample_is_left_out_or_an_error():
    assert mixture([[0, 0], [2]]).locate(0)[1] == 2
    with pytest.raises(ValueError, match="without a sample of source 0 in this split"):
        mixture([[0, 0], [2]], [0.5, 0.5])
    with pytest.raises(ValueError, match="got 3 shards without a sample"):
        mixture([[0, 0], [0]])


def test_empty_shards_and_more_shards_than_samples_are_no_matter():
    order = mixture([[0, 1, 0, 0, 1, 0]])
    assert Counter(order.locate(slot)[1:] for slot in range(2)) == Counter([(1, 0), (4, 0)])


def test_millions_of_samples_take_no_memory_to_speak_of():
    import tracemalloc

    tracemalloc.start()
    order = mixture([[1000] * 3000, [1000] * 600])
    for slot in np.random.default_rng(0).integers(0, 10**9, 20).tolist():
        order.locate(slot)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.num_samples == 3_600_000
    assert peak < 5_000_000
