"""A line of a run's metrics.jsonl, which TensorBoard, the terminal, a board and Prometheus show too."""

import re
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from salt_distill.common.metrics import gauge, metrics_of

_OF_TEACHER = re.compile(r"(val_)?loss_teacher\d+")


class MetricsLine(BaseModel):
    """Means over the steps since the line before, of all workers together."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, float] = Field(init=False)
    """With several teachers ``loss_teacher0``, ``loss_teacher1`` ..., of which ``loss`` is the weighted mean;
    where it was measured ``val_loss_teacher0`` ... too. Nothing else."""

    step: Annotated[int, gauge("steps")]
    """Optimizer steps done."""
    slot: int
    """Slots of the data order taken so far."""
    loss: Annotated[float, gauge("L1")]
    """Mean loss of the interval's steps."""
    lr: Annotated[float, gauge("learning rate")]
    """Learning rate."""
    weight_decay: float
    """Weight decay."""
    grad_norm: Annotated[float, gauge("norm")]
    """Norm of the gradient of all weights together."""
    clips_per_s: Annotated[float, gauge("clips/s")]
    """Clips trained on per second, by all workers together."""
    tokens_per_s: Annotated[float, gauge("tokens/s")]
    """The same in tokens; a clip counts with all its tokens."""
    mfu: Annotated[float, gauge("ratio")]
    """Model FLOPs utilisation: matrix products of the run per second, over the measured peak."""
    teacher_wait_ms: Annotated[float, gauge("milliseconds")]
    """Time that a step waited for its targets."""
    data_wait_ms: Annotated[float, gauge("milliseconds")]
    """Time that a step waited for its clips."""
    step_ms: Annotated[float, gauge("milliseconds")]
    """Time of a step."""
    context_fraction: float
    """Share of the tokens that the encoder saw, per mask set."""
    target_fraction: float
    """Share of the tokens that were predicted, per mask set."""
    flops: Annotated[float, gauge("FLOP")]
    """Compute of the run so far, the teacher's forwards included."""
    bad_clips: Annotated[int, gauge("clips")]
    """Clips that could not be decoded."""
    group_skew_clips: int | float | None = None
    """Clips that the run was ahead of the slowest of its group; None without a group."""
    group_wait_s: float | None = None
    """Seconds that the run has waited for its group so far; None without a group."""

    val_loss: Annotated[float | None, gauge("L1")] = None
    """Loss on held-out clips after this step; None where it was not measured."""
    val_rankme: float | None = None
    """RankMe of the encoder's features of the held-out clips: 1 to its channels."""
    val_knn: float | None = None
    """Share of the held-out clips that are named right by their nearest ones."""
    predicted_accuracy: Annotated[float | None, gauge("ratio")] = None
    """Accuracy that the held-out loss predicts; None without `--predict-from`, or where it predicts none."""
    predicted_low: Annotated[float | None, gauge("ratio")] = None
    """Lower end of the prediction's interval, in which 95% of new runs would lie."""
    predicted_high: Annotated[float | None, gauge("ratio")] = None
    """Upper end of that interval."""
    val_ms: float | None = None
    """What the measurement on held-out clips took, in milliseconds, beside the steps."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := [name for name in self.__pydantic_extra__ if not _OF_TEACHER.fullmatch(name)]:
            raise ValueError(f"got {', '.join(unknown)}, expected values of a line of metrics")
        return self

    def of_teacher(self, number: int) -> Self:
        """With the losses of one teacher of the run in place of the run's; of a run with one teacher the line
        itself."""
        losses = {
            name: self.__pydantic_extra__.get(f"{name}_teacher{number}") for name in ("loss", "val_loss")
        }
        return self.model_copy(update={name: loss for name, loss in losses.items() if loss is not None})

    def values(self) -> dict[str, int | float]:
        """What is there, by name, as plain numbers."""
        return self.model_dump(exclude_none=True)


STUDENT = metrics_of(MetricsLine, prefix="student_")
"""Of the newest line: means over `log_every` steps."""
