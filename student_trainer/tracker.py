"""A run's metrics on Weights & Biases, for those who ask for it."""

import uuid
from pathlib import Path

from salt_distill.common.config import TrainConfig, shown_config
from salt_distill.common.metrics_line import MetricsLine

ID_FILE = "wandb_id"


class Tracker:
    """The run of ``config.out`` in the project ``config.wandb``; a run that is resumed goes on there."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises ValueError where the package is not installed."""
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ValueError(
                f"got --wandb {config.wandb}, but the package wandb is not installed: pip install wandb, or"
                " leave it out"
            ) from error
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
        values = line.values()
        del values["step"]
        self._run.log(values, step=line.step)

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()
