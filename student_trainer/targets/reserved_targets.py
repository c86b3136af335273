"""Targets of a service, with a teacher in the student's own process in reserve."""

from collections.abc import Sequence
from concurrent.futures import Future

from jaxtyping import Shaped
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import (
    TargetDtype,
)
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.masking import MaskGroup
from salt_distill.student_trainer.targets.client import TeacherMismatchError, require_same_teacher
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.retry import TeacherUnavailableError
from salt_distill.student_trainer.targets.service_targets import ServiceTargets


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

    def report(self, line: MetricsLine, *, is_last: bool = False) -> None:
        """See TargetSource."""
        self._service.report(line, is_last=is_last)

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
