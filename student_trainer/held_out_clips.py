"""The clips on which a run is judged while it trains, with what they are judged by: the same for every
run of a data set, and of a data seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import MASK_GROUP_SIZE, TrainConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.sample import Sample
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import MaskGroup, group_idx
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.evaluation.held_out import held_out_masks
from salt_distill.student_trainer.evaluation.probe.features import common_labels
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.targets.source import TargetSource
from salt_distill.student_trainer.targets.stored_targets import TargetMissError

_VIEW = 0
"""The view of each clip: the first of those that runs pin, which a target cache has too."""
_SEED = 0
"""Of the masks, whatever the run's own: the losses of two runs are of one task."""


@dataclass(frozen=True, kw_only=True)
class HeldOutClips:
    """A rank's share of them, whole mask groups, in the host's memory."""

    batch: Batch
    """Without a good clip where there are fewer mask groups than ranks."""
    targets: Sequence[Shaped[Tensor, "b n packed"]]
    """Of each teacher."""
    num_clips: int
    """Of all ranks."""
    num_good: int
    """Of all ranks, those that could be decoded."""
    num_bytes: int
    """Of all ranks, clips and targets."""
    label: str | None
    """One that all of them have: the first by name."""
    classes: Int[Tensor, " good"] | None
    """Its class numbers, of the good clips of all ranks."""


def read_held_out(
    config: TrainConfig, worker: Worker, reader: Reader, sources: Sequence[TargetSource], *, slot: int
) -> HeldOutClips:
    """Decodes the clips that ``reader`` holds out, and asks ``sources`` for their targets; every rank calls
    it. ``slot``: where the run stands, for its group.

    Raises TargetMissError where a cache lacks them, ValueError where none can be decoded.
    """
    assert reader.held_out is not None, "it was opened for this"
    samples = reader.dataset.take(reader.held_out.rows)
    groups = group_idx(len(samples), worker.rank, worker.world_size) or range(1)
    is_own = groups == group_idx(len(samples), worker.rank, worker.world_size)
    mine = samples[MASK_GROUP_SIZE * groups.start : MASK_GROUP_SIZE * groups.stop]
    clips = worker.together(lambda: reader.view(mine, _VIEW))
    clips = replace(clips, good=clips.good & is_own)
    masks = held_out_masks(
        config.mask,
        token_grid(config.view, config.encoder),
        seed=_SEED,
        num_clips=len(samples),
        groups=groups,
    )
    split = reader.held_out.split
    targets = [_targets(worker, source, clips, masks, split, slot) for source in sources]
    good = [sample for sample, is_good in zip(mine, clips.good, strict=True) if is_good]
    all_good = [sample for of_rank in worker.ranks.all_values(good) for sample in of_rank]
    if not all_good:
        raise ValueError(
            f"{config.data}: none of the {len(samples)} held-out clips of split {reader.held_out.split!r} can"
            f" be decoded, expected some for --val-every: {next(iter(reader.skipped.items()), '')}"
        )
    num_bytes = clips.pixels.nbytes + sum(target.nbytes for target in targets)
    label = next(iter(common_labels(all_good)[0]), None)
    return HeldOutClips(
        batch=Batch(step=0, clips=clips, masks=masks),
        targets=targets,
        num_clips=len(samples),
        num_good=len(all_good),
        num_bytes=sum(worker.ranks.all_values(num_bytes)),
        label=label,
        classes=None if label is None else _classes(all_good, label),
    )


def _targets(
    worker: Worker,
    source: TargetSource,
    clips: ClipBatch,
    masks: Sequence[MaskGroup],
    split: str,
    slot: int,
) -> Shaped[Tensor, "b n packed"]:
    try:
        target, _ = worker.ranks.result(source.request(clips, masks=masks, slot=slot))
    except TargetMissError as error:
        raise TargetMissError(
            f"got --val-every with a target cache that lacks held-out clips of split {split!r}: precompute"
            f" them too (salt-serve precompute --split all, into an empty folder), or leave --val-every"
            f" out. {error}"
        ) from error
    return target.cpu()


def _classes(samples: Sequence[Sample], label: str) -> Int[Tensor, " good"]:
    return torch.from_numpy(np.array([sample.labels[label] for sample in samples], np.int64))
