"""The order in which a run sees a data set: slot -> sample."""

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from salt_distill.common.draws import words


class Order:
    """A permutation of the samples of one source per pass, found without walking to it (DESIGN section 4,
    Slot and order).

    Shards are permuted per pass; then the samples of each window of ``shuffle_shards`` shards are permuted
    together. Both by sorting hashes of (data_seed, pass), so position p means the same sample whatever came
    before, and a reader that follows it has few shards open.
    """

    def __init__(
        self, shard_sizes: Sequence[int], data_seed: int, shuffle_shards: int, source: str = ""
    ) -> None:
        """``shard_sizes``: samples of each shard, 0 allowed. Raises ValueError for a source without
        samples."""
        self.num_samples = sum(shard_sizes)
        if not self.num_samples:
            raise ValueError(
                f"got {len(shard_sizes)} shards without a sample in this split, expected at least one: choose"
                " another --split"
            )
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._data_seed = data_seed
        self._shuffle_shards = shuffle_shards
        self._of_source = f" of {source}" if source else ""
        self._windows = functools.lru_cache(maxsize=2)(self._windows_of)
        self._samples = functools.lru_cache(maxsize=4)(self._samples_of)

    def locate(self, position: int) -> tuple[int, int, int]:
        """(pass, shard_idx, sample_idx in the shard) of a position."""
        number, place = divmod(position, self.num_samples)
        _, ends = self._windows(number)
        window = bisect.bisect_right(ends, place)
        shard_idx, sample_idx = self._samples(number, window)
        within = place - (ends[window - 1] if window else 0)
        return number, int(shard_idx[within]), int(sample_idx[within])

    def _windows_of(self, number: int) -> tuple[list[np.ndarray], list[int]]:
        """The shards of each window, and the position after each window's last sample."""
        order = np.argsort(
            words(self._data_seed, f"order of shards{self._of_source}", number, len(self._sizes)),
            kind="stable",
        )
        windows = [
            order[start : start + self._shuffle_shards]
            for start in range(0, len(order), self._shuffle_shards)
        ]
        return windows, list(itertools.accumulate(int(self._sizes[window].sum()) for window in windows))

    def _samples_of(self, number: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted samples of a window: their shard, their place in it."""
        shards = self._windows(number)[0][window]
        shard_idx = np.repeat(shards, self._sizes[shards])
        sample_idx = np.concatenate([np.arange(int(self._sizes[shard])) for shard in shards])
        order = np.argsort(
            words(self._data_seed, f"order of window {window}{self._of_source}", number, len(shard_idx)),
            kind="stable",
        )
        return shard_idx[order], sample_idx[order]


class Mixture:
    """The orders of several sources in one: a closed form says which of them a slot takes, so no slot depends
    on how another was found."""

    def __init__(
        self,
        shard_sizes: Sequence[int],
        shard_sources: Sequence[int],
        names: Sequence[str],
        weights: Sequence[float] | None,
        *,
        data_seed: int,
        shuffle_shards: int,
    ) -> None:
        """For each shard its samples and its source; for each source its name, and its share in what is read
        relative to the others.

        Without weights every sample is read equally often. Raises ValueError where there is no sample, or
        none of a source with a weight.
        """
        members: list[list[int]] = [[] for _ in names]
        for shard, source in enumerate(shard_sources):
            members[source].append(shard)
        sizes = [[shard_sizes[shard] for shard in shards] for shards in members]
        self._shares = [sum(of_source) for of_source in sizes] if weights is None else shares_of(weights)
        """How many of every ``sum(shares)`` slots a source takes."""
        empty = [name for name, of_source in zip(names, sizes, strict=True) if not sum(of_source)]
        if len(empty) == len(names) or (empty and weights is not None):
            raise ValueError(
                f"got {len(shard_sizes)} shards without a sample{f' of {empty[0]}' if empty[0] else ''} in"
                " this split, expected at least one: choose another --split"
            )
        self._sources = [
            (Order(of_source, data_seed, shuffle_shards, name), shards) if sum(of_source) else None
            for of_source, shards, name in zip(sizes, members, names, strict=True)
        ]
        self.num_samples = sum(map(sum, sizes))

    def locate(self, slot: int) -> tuple[int, int, int]:
        """(pass of its source, shard_idx, sample_idx in the shard) of a slot."""
        place, position = interleave(self._shares, slot)
        source = self._sources[place]
        assert source is not None, "a source without samples takes no slot"
        order, shards = source
        number, shard_idx, sample_idx = order.locate(position)
        return number, shards[shard_idx], sample_idx


def interleave(shares: Sequence[int], slot: int) -> tuple[int, int]:
    """(source, how many slots it took before): source i takes ``shares[i]`` of every ``sum(shares)`` slots,
    evenly spread.

    The first source takes a slot wherever slot * share / sum passes a whole number; what it leaves is
    numbered anew and divided among the others in the same way. So after any number of slots a source is off
    its exact share by less than the number of sources.
    """
    remaining = sum(shares)
    for source, share in enumerate(shares):
        taken = slot * share // remaining
        if (slot + 1) * share // remaining > taken:
            return source, taken
        slot -= taken
        remaining -= share
    raise AssertionError("the last source takes every slot that the others leave")


def shares_of(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportion of these weights, read as the decimal numbers that they
    were written as."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [share // math.gcd(*whole) for share in whole]
