"""Where a student's targets come from: for each teacher a service, a cache, or the teacher in its own
process. All three give the same bits."""

import json
from collections.abc import Iterator, Sequence
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
from salt_distill.student_trainer.targets.client import TeacherMismatchError, require_same_teacher
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


def open_sources(
    config: StudentRun, *, run: str, rank: int = 0, device: torch.device | None = None
) -> Iterator[TargetSource]:
    """The source of each teacher's targets, in their order: services, caches, checkpoints.

    ``run``: its name on a service's board. ``rank``: of this process in it. ``device``: of a teacher in this
    process; None: a GPU if there is one.
    """
    for number, url in enumerate(config.teacher_url):
        service = ServiceTargets(
            url,
            config.target_dtype,
            config.client,
            run,
            for_ever=config.on_teacher_loss == "wait",
            masked=config.masked_targets,
            token=access_token(config.teacher_token_file),
            ca=config.teacher_ca,
            # two services' windows could each wait for the other
            group=config.group if number == 0 else None,
            rank=rank,
            cache=config.cache[number] if config.cache else None,
            shown=shown_config(config) if rank == 0 else None,
            num_steps=config.steps,
        )
        if config.on_teacher_loss != "local":
            yield service
            continue
        try:
            reserved = ReservedTargets(service, _local_targets(config, config.teacher_ckpt[number], device))
        except BaseException:
            service.close()
            raise
        yield reserved
    for path in config.targets:
        yield StoredTargets(
            path,
            config.target_dtype,
            data=config.data,
            split=config.split,
            data_seed=config.data_seed,
            view=config.view,
            decoder=decoder_name(),
        )
    if config.on_teacher_loss != "local":
        for ckpt in config.teacher_ckpt:
            yield _local_targets(config, ckpt, device)


def source_order(config: StudentRun, number: int) -> str:
    """Where a run looks for a target of teacher ``number``, first to last."""
    if number < len(config.teacher_url):
        places = [("cache", config.cache), ("service", config.teacher_url)]
        if config.on_teacher_loss == "local":
            places.append(("in process", config.teacher_ckpt))
        return ", then ".join(f"{kind} {each[number]}" for kind, each in places if each)
    others = [("cache", path) for path in config.targets]
    others += [("in process", ckpt) for ckpt in config.teacher_ckpt]
    return " ".join(others[number - len(config.teacher_url)])


def require_teachers(sources: Sequence[TargetSource], began_with: str | None) -> None:
    """Raises TeacherMismatchError unless the targets are those of the teachers that a run began with
    (``Position.teacher``), in their order."""
    if began_with is None:
        return
    then = [TeacherSpec.from_json(json.loads(line)) for line in began_with.splitlines()]
    before, now = [spec.fingerprint for spec in then], [source.spec.fingerprint for source in sources]
    if before != now and max(len(before), len(now)) > 1:
        raise TeacherMismatchError(
            f"--resume: got teachers {_short(now)}, expected those that the run began with, in their order,"
            f" {_short(before)}: give their --teacher-url, --targets or --teacher-ckpt, or start a new run"
        )
    for source, spec in zip(sources, then, strict=True):
        require_same_teacher(source.spec, spec)


def _local_targets(config: StudentRun, ckpt: str, device: torch.device | None) -> LocalTargets:
    choice = FrozenConfig(
        ckpt=ckpt,
        num_frames=config.view.num_frames,
        crop_size=config.view.crop_size,
        patch_size=config.encoder.patch_size,
        tubelet_size=config.encoder.tubelet_size,
    )
    return LocalTargets(Teacher(open_encoder(choice), config.teacher, device), config.target_dtype)


def views_of(config: TrainConfig) -> Views:
    """Views per sample of a run: with ``--targets`` the caches' K. Raises ValueError where the run asks for
    another number, or the caches have different ones."""
    asked = config.views
    for path in config.targets if isinstance(config, StudentRun) else ():
        views = TargetCache(fetched(path)).spec.views
        if views is None:
            raise ValueError(
                f"{path} holds what a service wrote through, which no run's clips are all in: precompute, or"
                " use the service"
            )
        if config.views not in ("fresh", views):
            raise ValueError(
                f"got --views {config.views}, but {path} holds {views} views per sample: leave --views out"
            )
        if asked not in ("fresh", views):
            raise ValueError(
                f"{path} holds {views} views per sample, expected {asked} as in the cache before it: all"
                " teachers see the same clips"
            )
        asked = views
    return asked


def _short(fingerprints: list[str]) -> str:
    return ", ".join(each[:12] for each in fingerprints)
