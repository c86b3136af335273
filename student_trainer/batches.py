"""A rank's share of each global batch, read and asked of the teacher ahead of the step."""

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import MASK_GROUP_SIZE, MaskConfig, TrainConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.grid import TokenGrid, token_grid
from salt_distill.common.model.masking import MaskGroup, MaskSet, group_idx, mask_group
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.targets.source import TargetSource


@dataclass(frozen=True, kw_only=True)
class Group:
    """The clips of one mask group, on the device that trains: what one forward and backward take."""

    pixels: UInt8[Tensor, "b t h w 3"]
    good: Bool[Tensor, " b"]
    targets: Sequence[Shaped[Tensor, "b n packed"]]
    """Of each teacher."""
    masks: MaskGroup
    last: bool
    """Of its batch, on this rank."""

    @property
    def inputs(self) -> tuple[Tensor | MaskGroup, ...]:
        """What an objective's ``forward`` takes: clips, masks, and the targets that come from outside."""
        return (self.pixels, self.masks, *self.targets)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step of one rank needs."""

    step: int
    clips: ClipBatch
    masks: list[MaskGroup]
    targets: Sequence[Future[Shaped[Tensor, "b n packed"]]] = ()
    """Of each teacher, packed (Note [packed]), with zeros in the rows of bad clips."""

    def groups(
        self,
        targets: Sequence[Shaped[Tensor, "b n packed"]],
        device: torch.device,
        num_passes: int | None = None,
    ) -> Iterator[Group]:
        """The mask groups in order, each copied to the device when it is asked for. ``targets``: what
        ``self.targets`` came to.

        The last one comes again, without a good clip, until there are ``num_passes``, if that is given.
        """
        first, group, num_passes = 0, None, num_passes or len(self.masks)
        for number, masks in enumerate(self.masks, start=1):
            rows = slice(first, first + masks.size)
            first = rows.stop
            sets = (
                MaskSet(visible_idx=_to(s.visible_idx, device), hidden_idx=_to(s.hidden_idx, device))
                for s in masks.sets
            )
            group = Group(
                pixels=_to(torch.from_numpy(self.clips.pixels[rows]), device),
                good=_to(torch.from_numpy(self.clips.good[rows]), device),
                targets=[_to(target[rows], device) for target in targets],
                masks=replace(masks, sets=tuple(sets)),
                last=number == num_passes,
            )
            yield group
        assert group is not None, "a rank has one at least"
        for number in range(len(self.masks) + 1, num_passes + 1):
            yield replace(group, good=torch.zeros_like(group.good), last=number == num_passes)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a rank: slots and masks are functions of the step alone, so a run resumes anywhere, at
    any world size."""

    reader: Reader
    sources: Sequence[TargetSource]
    mask: MaskConfig
    grid: TokenGrid
    seed: int
    batch_size: int
    rank: int
    world_size: int
    prefetch_steps: int

    @classmethod
    def of(cls, config: TrainConfig, reader: Reader, sources: Sequence[TargetSource], worker: Worker) -> Self:
        """Those of a run."""
        return cls(
            reader=reader,
            sources=sources,
            mask=config.mask,
            grid=token_grid(config.view, config.encoder),
            seed=config.seed,
            batch_size=config.batch_size,
            rank=worker.rank,
            world_size=worker.world_size,
            prefetch_steps=config.loader.prefetch_steps,
        )

    def steps(self, first: int, last: int) -> Iterator[Future[Batch]]:
        """Batches of the steps ``first..last``, of which ``prefetch_steps`` are in the making ahead of the
        one in use."""
        # Two batches are read at a time, so that no decoding process waits for the last clip of one; they are
        # made in order.
        reading = ThreadPoolExecutor(max_workers=2, thread_name_prefix="clips")
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        pending: collections.deque[Future[Batch]] = collections.deque()
        upcoming = iter(range(first, last + 1))
        try:
            for step in upcoming:
                pending.append(pool.submit(self._make, step, reading.submit(self._clips, step)))
                if len(pending) > self.prefetch_steps:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            reading.shutdown(wait=True, cancel_futures=True)
            pool.shutdown(wait=True, cancel_futures=True)

    def _clips(self, step: int) -> ClipBatch:
        groups = group_idx(self.batch_size, self.rank, self.world_size)
        first_slot = (step - 1) * self.batch_size
        last_of_rank = min(MASK_GROUP_SIZE * groups.stop, self.batch_size)
        return self.reader.clips(
            range(first_slot + MASK_GROUP_SIZE * groups.start, first_slot + last_of_rank)
        )

    def _make(self, step: int, reading: Future[ClipBatch]) -> Batch:
        groups = group_idx(self.batch_size, self.rank, self.world_size)
        masks = [
            mask_group(
                self.mask, self.grid, seed=self.seed, step=step, group=group, batch_size=self.batch_size
            )
            for group in groups
        ]
        clips = reading.result()
        slot = (step - 1) * self.batch_size + MASK_GROUP_SIZE * groups.start
        targets = [source.request(clips, masks=masks, slot=slot) for source in self.sources]
        return Batch(step=step, clips=clips, masks=masks, targets=targets)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A GPU gets it from pinned memory, so that neither this thread nor the GPU's
    work under way waits for the copy."""
    from_host = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if from_host else tensor.to(device)
