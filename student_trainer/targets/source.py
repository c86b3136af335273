"""Where a student's targets come from: a service, a cache, or a teacher in its own process. All three give
the same bits."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import torch
from jaxtyping import Shaped
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import (
    FrozenConfig,
    StudentRun,
    TargetDtype,
    TrainConfig,
    Views,
    shown_config,
)
from salt_distill.common.credentials import access_token
from salt_distill.common.data.video import decoder_name
from salt_distill.common.folders.fetched import fetched
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.teacher import Teacher, TeacherSpec
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.reserved_targets import ReservedTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.student_trainer.targets.stored_targets import StoredTargets


class TargetSource(Protocol):
    """A frozen teacher, wherever it is."""

    name: str
    """service, cache or in-process."""
    spec: TeacherSpec
    dtype: TargetDtype
    clip_flops: float
    """Of a clip's target in this process; 0 where it comes from elsewhere."""

    def require(self, spec: TeacherSpec) -> None:
        """Raises TeacherMismatchError unless the targets are those of ``spec``, which a run began with."""
        ...

    def request(
        self, batch: ClipBatch, *, masks: Sequence[MaskGroup] = (), slot: int = 0
    ) -> Future[Shaped[Tensor, "b n packed"]]:
        """The targets to come, packed (Note [packed]), in the batch's order; zeros in rows that are not good.
        The future may raise. On the host, or where the teacher of this process computed them.

        ``masks`` of the rows: tokens that they do not hide may be left out, as zeros. ``slot``: of the first
        row, for the run's group.
        """
        ...

    def report(self, line: MetricsLine, *, is_last: bool = False) -> None:
        """Tells whoever watches the run about a line of its metrics; never fails it. ``is_last``: with it the
        run has finished."""
        ...

    def metrics(self) -> dict[str, float]:
        """What it adds to a line of metrics."""
        ...

    def counters(self) -> dict[str, int | float]:
        """What it took so far."""
        ...

    def close(self) -> None:
        """Ends its threads; requests under way may fail."""
        ...


def open_source(
    config: StudentRun, *, run: str, rank: int = 0, device: torch.device | None = None
) -> TargetSource:
    """The source of targets that a run names.

    ``run``: its name on the service's board. ``rank``: of this process in it. ``device``: of a teacher in
    this process; None: a GPU if there is one.
    """
    if config.teacher_url is not None:
        service = ServiceTargets(
            config.teacher_url,
            config.target_dtype,
            config.client,
            run,
            for_ever=config.on_teacher_loss == "wait",
            masked=config.masked_targets,
            token=access_token(config.teacher_token_file),
            ca=config.teacher_ca,
            group=config.group,
            rank=rank,
            cache=config.cache,
            shown=shown_config(config) if rank == 0 else None,
            num_steps=config.steps,
        )
        if config.on_teacher_loss != "local":
            return service
        try:
            return ReservedTargets(service, _local_targets(config, device))
        except BaseException:
            service.close()
            raise
    if config.targets is not None:
        return StoredTargets(
            config.targets,
            config.target_dtype,
            data=config.data,
            split=config.split,
            data_seed=config.data_seed,
            view=config.view,
            decoder=decoder_name(),
        )
    return _local_targets(config, device)


def source_order(config: StudentRun) -> str:
    """Where a run looks for a target, first to last."""
    places = {
        "cache": config.targets or config.cache,
        "service": config.teacher_url,
        "in process": config.teacher_ckpt,
    }
    return ", then ".join(f"{kind} {place}" for kind, place in places.items() if place is not None)


def _local_targets(config: StudentRun, device: torch.device | None) -> LocalTargets:
    assert config.teacher_ckpt is not None, "a StudentRun has one source"
    choice = FrozenConfig(
        ckpt=config.teacher_ckpt,
        num_frames=config.view.num_frames,
        crop_size=config.view.crop_size,
        patch_size=config.encoder.patch_size,
        tubelet_size=config.encoder.tubelet_size,
    )
    return LocalTargets(Teacher(open_encoder(choice), config.teacher, device), config.target_dtype)


def views_of(config: TrainConfig) -> Views:
    """Views per sample of a run: with ``--targets`` the cache's K. Raises ValueError where the run asks for
    another number."""
    if not isinstance(config, StudentRun) or config.targets is None:
        return config.views
    views = TargetCache(fetched(config.targets)).spec.views
    if views is None:
        raise ValueError(
            f"{config.targets} holds what a service wrote through, which no run's clips are all in:"
            " precompute, or use the service"
        )
    if config.views not in ("fresh", views):
        raise ValueError(
            f"got --views {config.views}, but {config.targets} holds {views} views per sample: leave"
            " --views out"
        )
    return views
