"""Targets of a teacher in the student's own process."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from jaxtyping import Shaped
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import (
    TargetDtype,
)
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.targets import codec


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

    def report(self, line: MetricsLine, *, is_last: bool = False) -> None:
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
