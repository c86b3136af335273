"""Oracles of the multi-block masks: block sizes, and what truncation leaves (V-JEPA 2's code, 150 batches at
224 pixels)."""

from functools import cache

import numpy as np

from salt_distill.common.config import BlockSetConfig, MaskConfig, TubeSetConfig
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.masking import block_size, mask_sets
from salt_distill.student_trainer.evaluation.fidelity.oracle import VJEPA2, Oracle, exact, near

GRID = TokenGrid(8, 14, 14)
NUM_BATCHES = 150
RANGES = ("short range", "long range")
"""The mask sets, in order."""

BLOCKS = {
    "short range": [(5, 6), (6, 5), (6, 5), (5, 5), (5, 6), (6, 5)],
    "long range": [(11, 13), (12, 11), (13, 11), (11, 12), (11, 13), (14, 10)],
}
"""Height and width for seeds 0 to 5."""
SIZES = {
    "short range": [(5, 5), (5, 6), (6, 4), (6, 5), (7, 4)],
    "long range": [(10, 13), (10, 14), (11, 12), (11, 13), (12, 11), (12, 12), (13, 10), (13, 11), (14, 10)],
}
"""All that occur."""
FRACTIONS = {
    1: ((0.375, 0.625, 0.185, 0.815), (0.280, 1.0, 1.0)),
    24: ((0.234, 0.481, 0.068, 0.699), (0.151, 0.714, 0.767)),
    48: ((0.214, 0.452, 0.060, 0.697), (0.137, 0.667, 0.756)),
    96: ((0.199, 0.438, 0.057, 0.696), (0.128, 0.637, 0.754)),
}
"""By clips that share a block: context and target of the short, then of the long range; mean context, and
what each range uses in all."""
SLICES = {
    "short range, context": (73, 73, 72, 65, 46, 23, 10, 4),
    "short range, target": (123, 123, 123, 123, 120, 92, 40, 10),
    "long range, context": (38, 32, 18, 9, 4, 2, 2, 2),
    "long range, target": (159, 159, 159, 159, 159, 157, 113, 35),
}
"""Tokens of each of the eight time steps, of 196, at 24 clips."""


def blocks() -> list[Oracle]:
    """Sizes of blocks and tubes."""
    oracles = []
    for number, name in enumerate(RANGES):
        find = lambda seeds, number=number: [_block(seed, number) for seed in seeds]  # noqa: E731 - two oracles share it
        oracles.append(
            exact(f"{name}: blocks of seeds 0 to 5", VJEPA2, BLOCKS[name], lambda find=find: find(range(6)))
        )
        oracles.append(
            exact(
                f"{name}: blocks that occur",
                VJEPA2,
                SIZES[name],
                lambda find=find: sorted(set(find(range(2000)))),
            )
        )
    tube = exact("random tube of 0.9: tokens seen of 1568", "VideoMAE's code", 160, lambda: _tube(0.9))
    return [*oracles, tube]


def fractions() -> list[Oracle]:
    """Shares of the 1568 tokens that are seen and predicted."""
    oracles = []
    for clips, (shares, sums) in FRACTIONS.items():
        name = f"{clips} clips" if clips > 1 else "1 clip (nothing is cut)"
        oracles += [
            near(
                f"{name}: short context, target; long context, target",
                VJEPA2,
                shares,
                lambda clips=clips: _statistics(clips)[0],
                within=0.01,
            ),
            near(
                f"{name}: mean context; short, long context and target",
                VJEPA2,
                sums,
                lambda clips=clips: _sums(clips),
                within=0.01,
            ),
        ]
    return oracles


def slices() -> list[Oracle]:
    """Tokens per time step."""
    return [
        near(name, VJEPA2, expected, lambda number=number: _statistics(24)[1][number], within=3, digits=0)
        for number, (name, expected) in enumerate(SLICES.items())
    ]


def _block(seed: int, set_idx: int) -> tuple[int, int]:
    mask_set = MaskConfig().sets[set_idx]
    assert isinstance(mask_set, BlockSetConfig)
    return block_size(seed, GRID, mask_set)[1:]


def _tube(hidden_fraction: float) -> int:
    config = MaskConfig(sets=(TubeSetConfig(hidden_fraction=hidden_fraction),))
    return mask_sets(config, GRID, seed=0, size_seed=0, clip_keys=["tube"])[0].visible_idx.shape[1]


def _sums(clips: int) -> tuple[float, ...]:
    short_context, short_target, long_context, long_target = _statistics(clips)[0]
    return ((short_context + long_context) / 2, short_context + short_target, long_context + long_target)


@cache
def _statistics(clips: int) -> tuple[list[float], list[list[float]]]:
    """Shares of the grid, and tokens per time step, of context and target of each mask set: means over
    batches whose sizes come from seeds 0 to 149."""
    shares = np.zeros(2 * len(RANGES))
    per_slice = np.zeros((2 * len(RANGES), GRID.t))
    for batch in range(NUM_BATCHES):
        sets = mask_sets(
            MaskConfig(),
            GRID,
            seed=0,
            size_seed=batch,
            clip_keys=[f"fidelity {batch} {row}" for row in range(clips)],
        )
        for number, idx in enumerate(
            idx for mask_set in sets for idx in (mask_set.visible_idx, mask_set.hidden_idx)
        ):
            shares[number] += idx.shape[1] / GRID.num_tokens
            per_slice[number] += (
                np.bincount(idx.flatten().numpy() // (GRID.h * GRID.w), minlength=GRID.t) / clips
            )
    return (shares / NUM_BATCHES).tolist(), (per_slice / NUM_BATCHES).tolist()
