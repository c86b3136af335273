"""The order in which a run sees a data set: slot -> sample."""

import bisect
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from common.draws import words


class Order:
    """A permutation of the data set per epoch, found without walking to it (DESIGN section 4, Slot and order).

    Shards are permuted per epoch; then the samples of each window of ``shuffle_shards`` shards are permuted together. Both by sorting
    hashes of (data_seed, epoch), so slot p means the same sample whatever came before, and a reader that follows it has few shards open.
    """

    def __init__(self, shard_sizes: Sequence[int], data_seed: int, shuffle_shards: int) -> None:
        """``shard_sizes``: samples of each shard, 0 allowed. Raises ValueError for a data set without samples."""
        self.num_samples = sum(shard_sizes)
        if not self.num_samples:
            raise ValueError(f"got {len(shard_sizes)} shards without a sample in this split, expected at least one: choose another --split")
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._data_seed = data_seed
        self._shuffle_shards = shuffle_shards
        self._windows = functools.lru_cache(maxsize=2)(self._windows_of)
        self._samples = functools.lru_cache(maxsize=4)(self._samples_of)

    def locate(self, slot: int) -> tuple[int, int, int]:
        """(epoch, shard_idx, sample_idx in the shard) of a slot."""
        epoch, position = divmod(slot, self.num_samples)
        _, ends = self._windows(epoch)
        window = bisect.bisect_right(ends, position)
        shard_idx, sample_idx = self._samples(epoch, window)
        within = position - (ends[window - 1] if window else 0)
        return epoch, int(shard_idx[within]), int(sample_idx[within])

    def _windows_of(self, epoch: int) -> tuple[list[np.ndarray], list[int]]:
        """The shards of each window, and the position after each window's last sample."""
        order = np.argsort(words(self._data_seed, "order of shards", epoch, len(self._sizes)), kind="stable")
        windows = [order[start : start + self._shuffle_shards] for start in range(0, len(order), self._shuffle_shards)]
        return windows, list(itertools.accumulate(int(self._sizes[window].sum()) for window in windows))

    def _samples_of(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted samples of a window: their shard, their place in it."""
        shards = self._windows(epoch)[0][window]
        shard_idx = np.repeat(shards, self._sizes[shards])
        sample_idx = np.concatenate([np.arange(int(self._sizes[shard])) for shard in shards])
        order = np.argsort(words(self._data_seed, f"order of window {window}", epoch, len(shard_idx)), kind="stable")
        return shard_idx[order], sample_idx[order]
