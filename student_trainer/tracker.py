"""A run's metrics on Weights & Biases, for those who ask for it."""

import uuid
from collections.abc import Sequence
from pathlib import Path

from salt_distill.common.config import TrainConfig, shown_config
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.student_trainer.event_files import tagged
from salt_distill.student_trainer.training_pictures import TrainingPicture

ID_FILE = "wandb_id"


class Tracker:
    """The run of ``config.out`` in the project ``config.wandb``; a run that is resumed goes on there."""

    def __init__(self, config: TrainConfig) -> None:
        import wandb

        out = Path(config.out)
        if not (out / ID_FILE).exists():
            (out / ID_FILE).write_text(uuid.uuid4().hex[:12] + "\n")
        self._run = wandb.init(
            project=config.wandb,
            name=out.name,
            id=(out / ID_FILE).read_text().strip(),
            resume="allow",
            dir=out,
            config={"objective": config.objective, **shown_config(config)},
            settings=wandb.Settings(silent=True),
        )

    def show(self, line: MetricsLine) -> None:
        """Adds a line of metrics at its step."""
        self._run.log(tagged(line), step=line.step)

    def show_pictures(self, step: int, pictures: Sequence[TrainingPicture]) -> None:
        """Adds pictures at a step."""
        import wandb

        images = {picture.tag: wandb.Image(picture.image, caption=picture.caption) for picture in pictures}
        self._run.log(images, step=step)

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()
