"""A run's TensorBoard events: scalars in groups, the configuration as hyperparameters, pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import JsonValue
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from salt_distill.common.config import TrainConfig, shown_config
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.whole import named_errors
from salt_distill.student_trainer.training_pictures import TrainingPicture

_GROUPS = {
    "loss": ("loss",),
    "val": (
        *("val_loss", "val_rankme", "val_knn", "val_ms"),
        *("predicted_accuracy", "predicted_low", "predicted_high"),
    ),
    "optim": ("lr", "weight_decay", "grad_norm"),
    "throughput": ("clips_per_s", "tokens_per_s", "mfu", "step_ms", "data_wait_ms"),
    "teacher": ("teacher_wait_ms", "group_skew_clips", "group_wait_s"),
    "masks": ("context_fraction", "target_fraction"),
    "run": ("slot", "flops", "bad_clips"),
}
TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names}
"""What each number of a line of metrics is called in TensorBoard and Weights & Biases, which show the numbers
of a group together."""


def tagged(line: MetricsLine) -> dict[str, int | float]:
    """The numbers of a line by their tags; the step is not among them."""
    return {_tag(name): value for name, value in line.values().items() if name != "step"}


def _tag(name: str) -> str:
    """That of ``loss_teacher0`` stands beside that of ``loss``."""
    of_all, separator, number = name.partition("_teacher")
    return TAGS[name] if name in TAGS else TAGS[of_all] + separator + number


class EventFiles:
    """The folder ``tensorboard`` of a run."""

    def __init__(self, config: TrainConfig, *, after_step: int) -> None:
        """Purged: what a killed process had written after ``after_step`` would be there twice."""
        self._folder = Path(config.out) / "tensorboard"
        self._writer = SummaryWriter(str(self._folder), purge_step=after_step + 1)
        values = {"objective": config.objective, **dict(_flat(shown_config(config)))}
        for summary in hparams(values, {TAGS["loss"]: None, TAGS["val_loss"]: None}):
            self._writer._get_file_writer().add_summary(summary)  # add_hparams would begin another run

    def show(self, line: MetricsLine) -> None:
        """Adds a line of metrics at its step."""
        with named_errors(self._folder):
            for tag, value in tagged(line).items():
                self._writer.add_scalar(tag, value, line.step)

    def show_pictures(self, step: int, pictures: Sequence[TrainingPicture]) -> None:
        """Adds pictures at a step."""
        with named_errors(self._folder):
            for picture in pictures:
                self._writer.add_image(picture.tag, picture.image, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the file."""
        with named_errors(self._folder):
            self._writer.close()


def _flat(values: dict[str, JsonValue], above: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Dotted keys; what is no plain value as text."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        elif value is not None:
            yield above + key, value if isinstance(value, str | int | float | bool) else str(value)
