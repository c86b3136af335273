"""Samples on which a run is judged while it trains: they are nobody's to learn from."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from salt_distill.common.data.shards import Dataset
from salt_distill.common.draws import words

VALIDATION = "val"
"""The split that they are taken from, where a data set has it."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Samples that are held out."""

    split: str
    """Whose they are."""
    rows: Int32[np.ndarray, " n"]
    """Of the index, in the order of a hash of their keys, which no seed, order or machine changes."""
    is_from_training: bool
    """They are of the split that a run trains on, which leaves them out."""


def hold_out(dataset: Dataset, split: str, number: int) -> HeldOut:
    """``number`` samples of the split ``val``, or all where it has fewer; of ``split``, which a run trains
    on, where there is no other for them. Raises ValueError where that would take more than half of it."""
    has_own = VALIDATION in dataset.splits and split not in (VALIDATION, "all")
    taken_from = VALIDATION if has_own else split
    rows = np.concatenate([shard.rows for shard in dataset.samples(taken_from)])
    if not has_own and 2 * number > len(rows):
        raise ValueError(
            f"{dataset.folder.address}: got --val-clips {number} of split {split!r}, which has {len(rows)}"
            f" samples, expected at most {len(rows) // 2}: lower --val-clips, or pack a split"
            f" {VALIDATION!r} of its own"
        )
    hashes = np.array([words(0, f"held out {key}", 0, 1)[0] for key in dataset.keys(rows)], np.uint64)
    chosen = rows[np.argsort(hashes, kind="stable")[:number]]
    return HeldOut(split=taken_from, rows=chosen, is_from_training=not has_own)
