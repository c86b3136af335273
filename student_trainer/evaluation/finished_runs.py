"""Finished runs, read from their directories."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from salt_distill.common.config import FrozenConfig, explain, load_yaml
from salt_distill.common.config.base import Several
from salt_distill.common.model.checkpoint import POINTER, open_encoder, read_config
from salt_distill.common.model.teacher import fingerprint
from salt_distill.common.text_files import read_text
from salt_distill.student_trainer.run_directory import read_metrics

Objective = Literal["vpixel", "salt", "vjepa"]
_SOURCES = {"teacher_url": "service", "targets": "cache", "teacher_ckpt": "in-process"}
"""What a student's configuration has, and where its targets come from then."""
_TEACHERS: TypeAdapter[tuple[str, ...]] = TypeAdapter(Several[str])


class _Part(BaseModel):
    """The part of a run's file that evaluations read."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class RunSettings(_Part):
    """Of ``config.yaml``."""

    data: str
    split: str
    seed: int
    batch_size: int
    """Clips of a step."""
    pixel_norm: str = "channel"
    """What V-Pixel's targets are normalised over."""


class TeacherName(_Part):
    """A frozen teacher."""

    fingerprint: str


class ParameterCounts(_Part):
    """Weights of a run's models."""

    encoder: int
    predictor: int


class RunResults(_Part):
    """Of ``summary.json``."""

    objective: Objective
    source: Several[str]
    """Where the targets of each of a student's teachers came from: service, cache or in-process."""
    steps: int
    batch_size: int
    loss_first: float
    loss_last: float
    flops: float
    """6ND of the whole run, its teacher's forwards included."""
    step_ms: float
    """Milliseconds of a step."""
    teacher_wait_ms: float | None
    """Milliseconds of a step that waited for targets."""
    num_parameters: ParameterCounts
    teacher: Several[TeacherName]


class LoggedStep(_Part):
    """A line of ``metrics.jsonl``."""

    step: int
    loss: float
    flops: float
    """6ND of the run so far."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a run directory says."""

    name: str
    path: Path
    settings: RunSettings
    results: RunResults
    metrics: list[LoggedStep]

    @property
    def objective(self) -> Objective:
        """vpixel (a teacher), salt (a student of a frozen teacher) or vjepa."""
        return self.results.objective

    @property
    def teacher_fingerprints(self) -> tuple[str, ...]:
        """The frozen teachers it learned from."""
        return tuple(teacher.fingerprint for teacher in self.results.teacher)

    @property
    def is_initialised(self) -> bool:
        """Whether it began with weights that somebody had trained (`--init`)."""
        return (self.path / POINTER).is_file() and read_config(self.path).init_fingerprint is not None

    @cached_property
    def fingerprint(self) -> str | None:
        """Of its newest encoder, whose weights are loaded for it; None where it has no checkpoint."""
        if not (self.path / POINTER).is_file():
            return None
        encoder = open_encoder(FrozenConfig(ckpt=str(self.path)))
        return fingerprint(encoder, encoder.load())


@dataclass(frozen=True, kw_only=True)
class UnfinishedRun:
    """A run that trains still, or ended before its last step; it has no summary.json."""

    name: str
    path: Path
    objective: Objective
    source: tuple[str, ...]
    """Where the targets of each of a student's teachers come from."""
    num_steps: int
    """Of the whole run."""
    metrics: list[LoggedStep]
    """So far; may be empty."""

    @property
    def teacher_fingerprints(self) -> tuple[str, ...]:
        """The frozen teachers that its newest checkpoint learned from; none without one."""
        return read_config(self.path).teacher_fingerprint if (self.path / POINTER).is_file() else ()


def objective_of(values: Mapping[str, Any]) -> Objective:
    """What a run with this ``config.yaml`` learns."""
    return "vpixel" if "pixel_norm" in values else "vjepa" if "ema" in values else "salt"


def read_unfinished(path: Path) -> UnfinishedRun:
    """A run that has no summary yet. Raises ValueError where its configuration is no run's."""
    values = load_yaml(path / "config.yaml")
    objective = objective_of(values)
    reserve = ["teacher_ckpt"] if values.get("on_teacher_loss") == "local" else []
    given = [
        source
        for key, source in _SOURCES.items()
        if key not in reserve
        for _ in _TEACHERS.validate_python(values.get(key))
    ]
    if not isinstance(values.get("steps"), int):
        raise ValueError(f"{path}: got a config.yaml without steps, expected that of a run of `salt-train`")
    return UnfinishedRun(
        name=path.resolve().name,
        path=path,
        objective=objective,
        source=tuple(given) if objective == "salt" else (),
        num_steps=values["steps"],
        metrics=[LoggedStep.model_validate(line) for line in read_metrics(path)],
    )


def is_run(path: Path) -> bool:
    """Whether a directory is a run's."""
    return (path / "config.yaml").is_file()


def find_runs(run_dirs: Sequence[str], folder: Path | None) -> tuple[list[FinishedRun], list[Path]]:
    """The finished runs among ``run_dirs`` and in ``folder``, teachers first, then by name, and the
    directories of unfinished ones.

    Raises ValueError where a named directory is no run, two have one name, or nothing is found.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(
            f"got --runs {folder}, expected a folder of run directories: there is no such folder"
        )
    paths = [Path(path) for path in run_dirs]
    for path in paths:
        if not is_run(path):
            raise ValueError(f"got {path}, expected a run directory: it holds no config.yaml")
    if folder is not None:
        named = {path.resolve() for path in paths}
        paths += [path for path in sorted(folder.iterdir()) if is_run(path) and path.resolve() not in named]
    if not paths:
        raise ValueError(f"got --runs {folder} without a run directory, expected some of `salt-train`")
    finished = [
        path for path in paths if (path / "summary.json").is_file() and (path / "metrics.jsonl").is_file()
    ]
    runs = [_read(path) for path in finished]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"got two runs of one name among {', '.join(names)}, expected names that differ")
    runs.sort(key=lambda run: (run.objective != "vpixel", run.name))
    return runs, [path for path in paths if path not in finished]


def find_finished(run_dirs: Sequence[str], folder: Path | None) -> tuple[list[FinishedRun], list[Path]]:
    """As ``find_runs``, for what needs a finished one. Raises ValueError where there is none."""
    runs, unfinished = find_runs(run_dirs, folder)
    if not runs:
        raise ValueError(
            f"got {len(unfinished)} run directories of which none has finished, expected one with a"
            " summary.json"
        )
    return runs, unfinished


def read_seconds(path: Path | None) -> dict[str, float]:
    """Seconds per step of a script, from lines of STEP<TAB>SECONDS; empty without a file."""
    if path is None or not path.is_file():
        return {}
    seconds = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        step, separator, value = line.partition("\t")
        if not separator:
            raise ValueError(f"{path}, line {number}: got {line!r}, expected STEP<TAB>SECONDS")
        seconds[step] = float(value)
    return seconds


def _read(path: Path) -> FinishedRun:
    try:
        return FinishedRun(
            name=path.resolve().name,
            path=path,
            settings=RunSettings.model_validate(load_yaml(path / "config.yaml")),
            results=RunResults.model_validate_json(read_text(path / "summary.json")),
            metrics=[LoggedStep.model_validate(line) for line in read_metrics(path)],
        )
    except (ValidationError, json.JSONDecodeError) as error:
        problem = explain(error).splitlines()[0] if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{path}: got {problem}; expected the files of a run of `salt-train`") from None
