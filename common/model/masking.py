"""V-JEPA's multi-block masks as a pure function of (seed, step, position in the global batch)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from common.config import MASK_GROUP_SIZE, MaskConfig, MaskSetConfig
from common.draws import uniforms, words
from common.model.grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class MaskSet:
    """What one forward of the student sees and predicts, for the clips of a mask group. Indices ascend and are disjoint."""

    visible_idx: Int[Tensor, "b v"]
    """Context tokens."""
    hidden_idx: Int[Tensor, "b k"]
    """Target tokens."""


@dataclass(frozen=True, kw_only=True)
class MaskGroup:
    """Consecutive positions of the global batch that share a block size and kept counts."""

    first: int
    """Position of the group's first clip."""
    size: int
    """Clips of the group."""
    sets: tuple[MaskSet, ...]
    """One per mask set of the configuration."""

    def to(self, device: torch.device) -> "MaskGroup":
        """The same masks on a device."""
        sets = tuple(
            MaskSet(visible_idx=s.visible_idx.to(device, non_blocking=True), hidden_idx=s.hidden_idx.to(device, non_blocking=True))
            for s in self.sets
        )
        return MaskGroup(first=self.first, size=self.size, sets=sets)


def mask_group(config: MaskConfig, grid: TokenGrid, *, seed: int, step: int, group: int, batch_size: int) -> MaskGroup:
    """The masks of positions [24 group, 24 group + 24) of a global batch; the last group may be smaller."""
    first = MASK_GROUP_SIZE * group
    size = min(MASK_GROUP_SIZE, batch_size - first)
    if size <= 0:
        raise ValueError(f"got mask group {group} of a batch of {batch_size}, expected at most {-(-batch_size // MASK_GROUP_SIZE) - 1}")
    # One draw of sizes for all sets of a (step, group): as in V-JEPA 2, short and long range share the aspect ratio.
    size_seed = int(words(seed, f"mask size {step}", group, 1)[0] >> np.uint64(1))
    sets = []
    for set_idx, mask_set in enumerate(config.sets):
        block = block_size(size_seed, grid, mask_set, config)
        keys = [f"mask {step} {first + row} {set_idx}" for row in range(size)]
        visible = np.stack([_visible(seed, key, grid, block, mask_set.num_blocks) for key in keys])
        sets.append(
            MaskSet(visible_idx=_keep(visible, config, seed, keys, "visible"), hidden_idx=_keep(~visible, config, seed, keys, "hidden"))
        )
    return MaskGroup(first=first, size=size, sets=tuple(sets))


def block_size(seed: int, grid: TokenGrid, mask_set: MaskSetConfig, config: MaskConfig) -> tuple[int, int, int]:
    """(t, h, w) of a block, in tokens, as V-JEPA 2's generator draws it from ``seed``: three uniforms, of which the third decides here."""
    generator = torch.Generator().manual_seed(seed)
    _, _, aspect = torch.rand(3, generator=generator).tolist()
    low, high = config.aspect_ratio
    ratio = low + aspect * (high - low)
    area = int(grid.h * grid.w * mask_set.area_fraction)
    t = max(1, int(grid.t * config.temporal_fraction))
    h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return t, min(max(h, 1), grid.h), min(max(w, 1), grid.w)


def _visible(seed: int, key: str, grid: TokenGrid, block: tuple[int, int, int], num_blocks: int) -> Bool[np.ndarray, " n"]:
    """Tokens outside every block of one clip; drawn again while no token is left."""
    attempt = 0
    while True:
        offsets = uniforms(seed, key, attempt, 3 * num_blocks).reshape(num_blocks, 3)
        visible = np.ones(grid, dtype=bool)
        room = [size - extent + 1 for size, extent in zip(grid, block, strict=True)]
        for start, top, left in np.floor(offsets * room).astype(int):
            visible[start : start + block[0], top : top + block[1], left : left + block[2]] = False
        if visible.any():
            return visible.reshape(-1)
        attempt += 1
        if attempt == 1000:
            raise ValueError(
                f"got mask blocks of {block} (t, h, w) on a token grid of {tuple(grid)}, expected blocks that leave tokens visible: "
                "lower area_fraction or num_blocks of mask.sets"
            )


def _keep(chosen: Bool[np.ndarray, "b n"], config: MaskConfig, seed: int, keys: list[str], name: str) -> Int[Tensor, "b k"]:
    """Indices of the chosen tokens, each row cut to the smallest row's count."""
    count = int(chosen.sum(1).min())
    if config.truncate == "first":
        rows = [np.flatnonzero(row)[:count] for row in chosen]
    else:
        rows = [_random_subset(np.flatnonzero(row), count, seed, f"{key} {name}") for row, key in zip(chosen, keys, strict=True)]
    return torch.from_numpy(np.stack(rows))


def _random_subset(idx: Int[np.ndarray, " n"], count: int, seed: int, key: str) -> Int[np.ndarray, " k"]:
    order = np.argsort(uniforms(seed, key, count, len(idx)), kind="stable")
    return np.sort(idx[order[:count]])


def group_idx(batch_size: int, rank: int, world_size: int) -> range:
    """The mask groups that a rank takes: whole ones, in order, as even as they come."""
    num_groups = -(-batch_size // MASK_GROUP_SIZE)
    return range(rank * num_groups // world_size, (rank + 1) * num_groups // world_size)
