"""A rank's share of each global batch, read and asked of the teacher ahead of the step."""

import collections
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from common.clip import ClipBatch
from common.config import MASK_GROUP_SIZE, MaskConfig
from common.data.reader import Reader
from common.model.grid import TokenGrid
from common.model.masking import MaskGroup, group_idx, mask_group
from student_trainer.target_source import TargetSource


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step of one rank needs."""

    step: int
    clips: ClipBatch
    masks: list[MaskGroup]
    target: Future[Float[Tensor, "b n d"]] | None
    """Rows of bad clips are zeros. None in stage 1."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a rank: slots and masks are functions of the step alone, so a run resumes anywhere, at any world size."""

    reader: Reader
    source: TargetSource | None
    mask: MaskConfig
    grid: TokenGrid
    seed: int
    batch_size: int
    rank: int
    world_size: int
    prefetch_steps: int

    def steps(self, first: int, last: int) -> Iterator[Future[Batch]]:
        """Batches of the steps ``first..last``, of which ``prefetch_steps`` are in the making ahead of the one in use."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")  # one: batches are made in order
        pending: collections.deque[Future[Batch]] = collections.deque()
        upcoming = iter(range(first, last + 1))
        try:
            for step in upcoming:
                pending.append(pool.submit(self._make, step))
                if len(pending) > self.prefetch_steps:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> Batch:
        groups = group_idx(self.batch_size, self.rank, self.world_size)
        masks = [mask_group(self.mask, self.grid, seed=self.seed, step=step, group=group, batch_size=self.batch_size) for group in groups]
        first = MASK_GROUP_SIZE * groups.start
        num_clips = sum(group.size for group in masks)
        first_slot = (step - 1) * self.batch_size + first
        clips = self.reader.clips(range(first_slot, first_slot + num_clips))
        target = None if self.source is None else self.source.request(clips)
        return Batch(step=step, clips=clips, masks=masks, target=target)
