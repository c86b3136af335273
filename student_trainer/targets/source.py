"""Where a student's targets come from: a service, a cache, or a teacher in its own process. All three give
the same bits."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
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
    ViewConfig,
    Views,
    shown_config,
)
from salt_distill.common.credentials import access_token
from salt_distill.common.data.video import decoder_name
from salt_distill.common.data.views import VIEW_VERSION, view_facts
from salt_distill.common.folders.fetched import fetched
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.teacher import Teacher, TeacherSpec
from salt_distill.common.targets import codec
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.student_trainer.targets.client import TeacherMismatchError, require_same_teacher
from salt_distill.student_trainer.targets.host_memory import new_targets
from salt_distill.student_trainer.targets.retry import TeacherUnavailableError
from salt_distill.student_trainer.targets.service_targets import ServiceTargets


class TargetMissError(ValueError):
    """A clip that the target cache does not hold."""


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

    def report(self, line: MetricsLine) -> None:
        """Tells whoever watches the run about a line of its metrics; never fails it."""
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


class StoredTargets:
    """Targets on disk; no teacher, no network. A clip that is not there stops the run."""

    name = "cache"
    clip_flops = 0.0

    def __init__(
        self, path: str | Path, dtype: TargetDtype, *, data_seed: int, view: ViewConfig, decoder: str
    ) -> None:
        """``data_seed``, ``view`` and ``decoder`` are the student's own, to explain a miss."""
        self._cache = TargetCache(fetched(path))
        cached = self._cache.spec
        if cached.target_dtype != dtype:
            raise ValueError(
                f"{path} holds {cached.target_dtype} targets, expected {dtype}: pass --target-dtype"
                f" {cached.target_dtype}"
            )
        self.dtype: TargetDtype = dtype
        self.spec = cached.teacher
        self.views = cached.views
        """K: the student's view number is its pass modulo K."""
        self._path = path
        self._mine = {"data_seed": data_seed, "view": view_facts(view), "decoder": decoder}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="targets")
        self._rows_read = 0

    def request(
        self, batch: ClipBatch, *, masks: Sequence[MaskGroup] = (), slot: int = 0
    ) -> Future[Shaped[Tensor, "b n packed"]]:
        """See TargetSource."""
        return self._pool.submit(self._read, batch)

    def require(self, spec: TeacherSpec) -> None:
        """See TargetSource."""
        require_same_teacher(self.spec, spec)

    def report(self, line: MetricsLine) -> None:
        """Nobody watches."""

    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def counters(self) -> dict[str, int | float]:
        """See TargetSource."""
        return {"rows_read": self._rows_read}

    def close(self) -> None:
        """See TargetSource."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, batch: ClipBatch) -> Shaped[Tensor, "b n packed"]:
        out = new_targets(batch, self.spec, self.dtype)
        for row, encoded in enumerate(self._cache.targets(batch.digests)):
            if not batch.good[row]:
                continue
            if encoded is None:
                raise TargetMissError(self._explain(batch, row))
            try:
                codec.pack_into(out[row], encoded, self.dtype)
            except codec.CorruptTargetError as error:
                cached = self._cache.find(batch.digests[row])
                assert cached is not None, "it was found a moment ago"
                raise codec.CorruptTargetError(
                    f"{self._path}: sample {cached.key}, view {cached.view}: {error}"
                ) from error
        self._rows_read += int(batch.good.sum())
        return out

    def _explain(self, batch: ClipBatch, row: int) -> str:
        theirs = self._cache.spec.to_json()
        different = [
            f"{name}: here {mine}, in the cache {theirs[name]}"
            for name, mine in self._mine.items()
            if theirs[name] != mine
        ]
        same = [f"{name}: {mine}" for name, mine in self._mine.items() if theirs[name] == mine]
        advice = "Run with the cache's values, or precompute with these"
        if theirs["view"] and (version := theirs["view"].get("version", 1)) != VIEW_VERSION:
            advice = (
                f"Precompute again: equal draws give other crops in view version {VIEW_VERSION}, which is"
                f" used here, than in the cache's, {version}"
            )
        return (
            f"{self._path} has no targets for clip {batch.digests[row].hex()[:12]} (sample {batch.keys[row]},"
            f" view {batch.views[row]} of {self.views}). Different: {'; '.join(different) or 'none'}. Equal:"
            f" {'; '.join(same) or 'none'}. {advice}"
        )


class LocalTargets:
    """Targets of a teacher in this process, rounded as on the wire."""

    name = "in-process"

    def __init__(self, teacher: Teacher, dtype: TargetDtype) -> None:
        self.dtype: TargetDtype = dtype
        self.spec = teacher.spec
        self.clip_flops = teacher.clip_flops
        self._teacher = teacher
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="targets")
        self._clips_computed = 0

    def request(
        self, batch: ClipBatch, *, masks: Sequence[MaskGroup] = (), slot: int = 0
    ) -> Future[Shaped[Tensor, "b n packed"]]:
        """See TargetSource."""
        return self._pool.submit(self._compute, batch)

    def require(self, spec: TeacherSpec) -> None:
        """See TargetSource."""
        require_same_teacher(self.spec, spec)

    def report(self, line: MetricsLine) -> None:
        """Nobody watches."""

    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def counters(self) -> dict[str, int | float]:
        """See TargetSource."""
        return {"clips_computed": self._clips_computed}

    def close(self) -> None:
        """See TargetSource."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _compute(self, batch: ClipBatch) -> Shaped[Tensor, "b n packed"]:
        """On the teacher's device, which targets do not leave."""
        rows = list(batch.distinct().values())
        size = int(self.spec.compute["batch_size"])
        out = codec.empty_packed(
            len(batch.good), self.spec.num_tokens, self.spec.width, self.dtype, device=self._teacher.device
        ).zero_()
        for first in range(0, len(rows), size):
            group = rows[first : first + size]
            targets = self._teacher.forward(batch.pixels[[numbers[0] for numbers in group]])
            for numbers, packed in zip(group, codec.pack(targets, self.dtype), strict=True):
                for number in numbers:
                    out[number] = packed
            self._clips_computed += len(group)
        return out


class ReservedTargets:
    """A service with a teacher in this process in reserve, which computes while the service is lost. See Note
    [circuit]."""

    name = "service"
    clip_flops = 0.0

    def __init__(self, service: ServiceTargets, reserve: LocalTargets) -> None:
        """Raises TeacherMismatchError unless both give the same bits."""
        try:
            require_same_teacher(reserve.spec, service.spec)
        except TeacherMismatchError as error:
            raise TeacherMismatchError(
                f"the reserve of --on-teacher-loss local is not what the service runs: {error}. Give the"
                " service's checkpoint as --teacher-ckpt, and its batch size and threads by --set"
                " teacher.batch_size, teacher.num_threads"
            ) from error
        self._service, self._reserve = service, reserve
        self.dtype: TargetDtype = service.dtype
        self.spec = service.spec

    def request(
        self, batch: ClipBatch, *, masks: Sequence[MaskGroup] = (), slot: int = 0
    ) -> Future[Shaped[Tensor, "b n packed"]]:
        """See TargetSource."""
        whole: Future[Shaped[Tensor, "b n packed"]] = Future()

        def served(answer: Future[Shaped[Tensor, "b n packed"]]) -> None:
            if isinstance(answer.exception(), TeacherUnavailableError):
                self._reserve.request(batch).add_done_callback(lambda computed: _hand_over(computed, whole))
            else:
                _hand_over(answer, whole)

        self._service.request(batch, masks=masks, slot=slot).add_done_callback(served)
        return whole

    def require(self, spec: TeacherSpec) -> None:
        """See TargetSource."""
        require_same_teacher(self.spec, spec)

    def report(self, line: MetricsLine) -> None:
        """See TargetSource."""
        self._service.report(line)

    def metrics(self) -> dict[str, float]:
        """See TargetSource."""
        return self._service.metrics()

    def counters(self) -> dict[str, int | float]:
        """See TargetSource."""
        return {**self._service.counters(), **self._reserve.counters()}

    def close(self) -> None:
        """See TargetSource."""
        self._service.close()  # first: what it cannot answer any more goes nowhere
        self._reserve.close()


def _hand_over(done: Future[Shaped[Tensor, "b n packed"]], to: Future[Shaped[Tensor, "b n packed"]]) -> None:
    if done.cancelled():
        to.set_exception(ConnectionError("the target source was closed"))
    elif (error := done.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(done.result())


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
