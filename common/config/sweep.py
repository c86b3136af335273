"""Several students of one teacher: ``salt-train sweep``."""

from typing import Any

from pydantic import Field

from salt_distill.common.config.base import Config, ConfigValues, Several


class SweepConfig(Config):
    """The command; what is trained stands in its file."""

    file: str
    """YAML file of the sweep: preset, common values, runs and grid."""
    out: str
    """Folder of the sweep: a run directory for each run, their logs, summary.json."""
    teacher_url: Several[str] = ()
    """A teacher service, as `salt-serve teacher` prints it; instead of the source of targets that the file
    has."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the
    command."""
    json_: bool = False
    """One JSON object for programs, instead of tables for people."""

    @property
    def extras(self) -> tuple[str, ...]:
        return ("train", "eval")  # it ends with a report


class SweepFile(Config):
    """What is trained: values of `salt-train student`, as in its `--config` file. A key may be nested or
    dotted, optim: {lr: 1e-3} or optim.lr: 1e-3."""

    preset: str = "vit-l"
    """Preset of all runs; a run may have another."""
    common: ConfigValues = Field(default_factory=dict)
    """Values of all runs."""
    runs: dict[str, ConfigValues] = Field(default_factory=dict)
    """Name of a run -> what it has otherwise; `preset` and `mask` are names here too."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Key -> values: each run once with each combination, named after it."""
