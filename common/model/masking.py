"""Multi-block and random tube masks as a pure function of (seed, step, position in the global batch)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from salt_distill.common.config import MASK_GROUP_SIZE, BlockSetConfig, MaskConfig, TubeSetConfig
from salt_distill.common.draws import uniforms, words
from salt_distill.common.model.grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class MaskSet:
    """What one forward of the student sees and predicts, for the clips of a mask group. Indices ascend and
    are disjoint."""

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

    def hidden_by_any(self, num_tokens: int) -> list[Int[np.ndarray, " k"]]:
        """For each clip the tokens that some set hides, ascending: all that a student compares with the
        teacher's."""
        hidden = np.zeros((self.size, num_tokens), dtype=bool)
        for mask_set in self.sets:
            np.put_along_axis(hidden, mask_set.hidden_idx.numpy(), True, axis=1)
        return [np.flatnonzero(row) for row in hidden]


def mask_group(
    config: MaskConfig, grid: TokenGrid, *, seed: int, step: int, group: int, batch_size: int
) -> MaskGroup:
    """The masks of positions [24 group, 24 group + 24) of a global batch; the last group may be smaller."""
    first = MASK_GROUP_SIZE * group
    size = min(MASK_GROUP_SIZE, batch_size - first)
    if size <= 0:
        raise ValueError(
            f"got mask group {group} of a batch of {batch_size}, expected at most"
            f" {-(-batch_size // MASK_GROUP_SIZE) - 1}"
        )
    # One draw of sizes for all sets of a (step, group): as in V-JEPA 2, short and long range share the aspect
    # ratio.
    size_seed = int(words(seed, f"mask size {step}", group, 1)[0] >> np.uint64(1))
    keys = [f"mask {step} {first + row}" for row in range(size)]
    return MaskGroup(
        first=first, size=size, sets=mask_sets(config, grid, seed=seed, size_seed=size_seed, clip_keys=keys)
    )


def mask_sets(
    config: MaskConfig, grid: TokenGrid, *, seed: int, size_seed: int, clip_keys: list[str]
) -> tuple[MaskSet, ...]:
    """The masks of clips that share a block size, drawn from ``size_seed``, and kept counts; ``seed`` and a
    clip's key decide where its blocks are."""
    sets = []
    for set_idx, mask_set in enumerate(config.sets):
        keys = [f"{key} {set_idx}" for key in clip_keys]
        if isinstance(mask_set, TubeSetConfig):
            visible = _outside_tubes(seed, keys, grid, mask_set)
        else:
            visible = _outside_blocks(seed, keys, grid, block_size(size_seed, grid, mask_set), mask_set)
        sets.append(
            MaskSet(
                visible_idx=_keep(visible, config, seed, keys, "visible"),
                hidden_idx=_keep(~visible, config, seed, keys, "hidden"),
            )
        )
    return tuple(sets)


def block_size(seed: int, grid: TokenGrid, mask_set: BlockSetConfig) -> tuple[int, int, int]:
    """(t, h, w) of a block, in tokens, as V-JEPA 2's generator draws it from ``seed``: three uniforms, of
    which the third decides here."""
    generator = torch.Generator().manual_seed(seed)
    _, _, aspect = torch.rand(3, generator=generator).tolist()
    low, high = mask_set.aspect_ratio
    ratio = low + aspect * (high - low)
    area = int(grid.h * grid.w * mask_set.area_fraction)
    t = max(1, int(grid.t * mask_set.temporal_fraction))
    h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return t, min(max(h, 1), grid.h), min(max(w, 1), grid.w)


def _outside_blocks(
    seed: int, keys: list[str], grid: TokenGrid, block: tuple[int, int, int], mask_set: BlockSetConfig
) -> Bool[np.ndarray, "b n"]:
    """Tokens outside every block, in the time steps that may be visible; a clip is drawn again while no token
    of it is left."""
    room = [size - extent + 1 for size, extent in zip(grid, block, strict=True)]
    visible = np.zeros((len(keys), *grid), dtype=bool)
    for attempt in range(1000):
        empty = np.flatnonzero(~visible.any((1, 2, 3)))
        if not len(empty):
            return visible.reshape(len(keys), grid.num_tokens)
        draws = np.stack([uniforms(seed, keys[row], attempt, 3 * mask_set.num_blocks) for row in empty])
        offsets = np.floor(draws.reshape(len(empty), -1, 3) * room)[..., None]
        t, h, w = (
            (np.arange(size) >= offsets[:, :, axis]) & (np.arange(size) < offsets[:, :, axis] + extent)
            for axis, (size, extent) in enumerate(zip(grid, block, strict=True))
        )  # for each clip and block, its places along an axis
        visible[empty] = ~(t[..., None, None] & h[:, :, None, :, None] & w[:, :, None, None]).any(1)
        visible[empty, max(1, int(grid.t * mask_set.max_temporal_keep)) :] = False
    raise ValueError(
        f"got mask blocks of {block} (t, h, w) on a token grid of {tuple(grid)}, expected blocks that leave"
        " tokens visible: lower area_fraction or num_blocks of mask.sets"
    )


def _outside_tubes(
    seed: int, keys: list[str], grid: TokenGrid, mask_set: TubeSetConfig
) -> Bool[np.ndarray, "b n"]:
    """Tokens outside the tubes: in every time step the same places are hidden."""
    num_places = grid.h * grid.w
    num_hidden = int(
        mask_set.hidden_fraction * num_places
    )  # VideoMAE's rounding; V-JEPA's random tube keeps int(n * (1 - fraction))
    if num_hidden == 0:
        raise ValueError(
            f"got hidden_fraction={mask_set.hidden_fraction} of {num_places} places, expected at least one"
            " hidden place: raise it in mask.sets"
        )
    order = np.argsort(np.stack([uniforms(seed, key, 0, num_places) for key in keys]), axis=1, kind="stable")
    visible = np.ones((len(keys), num_places), dtype=bool)
    np.put_along_axis(visible, order[:, :num_hidden], False, axis=1)
    return np.tile(visible, (1, grid.t))


def _keep(
    chosen: Bool[np.ndarray, "b n"], config: MaskConfig, seed: int, keys: list[str], name: str
) -> Int[Tensor, "b k"]:
    """Indices of the chosen tokens, each row cut to the smallest row's count."""
    count = int(chosen.sum(1).min())
    if config.truncate == "first":
        idx = (
            np.flatnonzero(chosen & (chosen.cumsum(1) <= count)).reshape(len(chosen), count) % chosen.shape[1]
        )
    else:
        rows = zip(chosen, keys, strict=True)
        idx = np.stack(
            [_random_subset(np.flatnonzero(row), count, seed, f"{key} {name}") for row, key in rows]
        )
    return torch.from_numpy(idx)


def _random_subset(idx: Int[np.ndarray, " n"], count: int, seed: int, key: str) -> Int[np.ndarray, " k"]:
    order = np.argsort(uniforms(seed, key, count, len(idx)), kind="stable")
    return np.sort(idx[order[:count]])


def group_idx(batch_size: int, rank: int, world_size: int) -> range:
    """The mask groups that a rank takes: whole ones, in order, as even as they come."""
    num_groups = -(-batch_size // MASK_GROUP_SIZE)
    return range(rank * num_groups // world_size, (rank + 1) * num_groups // world_size)


def most_groups(batch_size: int, world_size: int) -> int:
    """The mask groups of a rank that has the most."""
    return max(len(group_idx(batch_size, rank, world_size)) for rank in range(world_size))
