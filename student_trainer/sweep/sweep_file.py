"""A sweep's file -> the runs that it means."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from salt_distill.common.config import (
    ConfigValues,
    StudentRun,
    SweepConfig,
    SweepFile,
    explain,
    mask_layer,
    merge,
    preset_layer,
    warmup_layer,
)
from salt_distill.common.config.layers import Layer, nested, read_config
from salt_distill.common.config.marks import DecidedBySweep, marked

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ONE_FOR_ALL = {
    "data_seed": "runs with different seeds see other clips and share no target",
    "group": "runs of different groups do not wait for each other",
}
"""Keys that have the same value in all runs, and why."""


def runs_of(config: SweepConfig) -> dict[str, StudentRun]:
    """The runs by their names, in the file's order. Raises ValueError that names the run and the key that is
    wrong."""
    file, layer = read_config(SweepFile, config.file)
    if not file.runs and not file.grid:
        raise ValueError(f"{config.file}: got no runs, expected `runs`, `grid` or both")
    runs: dict[str, StudentRun] = {}
    for (name, own), point in itertools.product((file.runs or {"": {}}).items(), _points(file.grid)):
        full_name = "_".join(
            part for part in (name, *(_named(key, value) for key, value in point.items())) if part
        )
        if not _NAME.fullmatch(full_name):
            raise ValueError(
                f"{config.file}: got a run named {full_name!r}, expected up to 64 letters, digits, '.', '_'"
                " and '-'"
            )
        if full_name in runs:
            raise ValueError(
                f"{config.file}: got two runs named {full_name}, expected different values in the grid"
            )
        where = _Where(config.file, layer, name, full_name)
        runs[full_name] = _run(config, file, where, nested(own), nested(point))
    sources = {(run.teacher_url, run.targets, run.teacher_ckpt) for run in runs.values()}
    if len(sources) > 1:
        raise ValueError(
            f"{config.file}: got {len(sources)} sources of targets, expected one, or the same of several"
            " teachers: losses under different teachers do not compare"
        )
    _require_one_for_all(runs, config.file)
    return runs


def _require_one_for_all(runs: dict[str, StudentRun], file: str) -> None:
    """Raises ValueError that names two runs which differ in what all of a sweep share."""
    first_name, first = next(iter(runs.items()))
    for (name, run), (key, reason) in itertools.product(runs.items(), _ONE_FOR_ALL.items()):
        value, expected = getattr(run, key), getattr(first, key)
        if value != expected:
            raise ValueError(
                f"{file}: run {name}: got {key}={value}, expected {expected}, as run {first_name} has it:"
                f" {reason}; give all runs the same, or write a sweep for each"
            )


@dataclass(frozen=True)
class _Where:
    """What an error calls a run and a key of it."""

    file: str
    layer: Layer
    name: str
    """Of the run in the file; the grid makes ``run`` of it."""
    run: str

    def __call__(self, key: str = "") -> str:
        lines = (self.layer.lines.get(f"{above}.{key}") for above in (f"runs.{self.name}", "grid", "common"))
        line = next((f", line {line}" for line in lines if line is not None), "")
        return f"{self.file}{line}: run {self.run}" + (f": {key}" if key else "")


def _run(config: SweepConfig, file: SweepFile, where: _Where, *own: ConfigValues) -> StudentRun:
    values = merge(nested(file.common), *own)
    if decided := [key for key, _ in marked(StudentRun, DecidedBySweep) if key in values]:
        raise ValueError(
            f"{where()}: got {', '.join(decided)}, expected none of it in the file: the sweep decides that"
        )
    if config.teacher_url:  # instead of the file's source
        values["teacher_url"] = config.teacher_url
        values.pop("targets", None)
        if values.get("on_teacher_loss") != "local":
            values.pop("teacher_ckpt", None)
    if values.get("teacher_url"):
        values = {"group": _group(config)} | values
    out = Path(config.out) / where.run
    preset, mask = values.pop("preset", file.preset), values.get("mask")
    try:
        preset_values = preset_layer(StudentRun, preset)
        masks = [mask_layer(values.pop("mask"))] if isinstance(mask, str) else []
        shorter_warmup, _ = warmup_layer(StudentRun, preset_values, values)
        decided_values = {"out": str(out), "resume": (out / "config.yaml").exists()}
        values = merge(preset_values, *masks, values, shorter_warmup, decided_values)
        run = StudentRun.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError(explain(error, [Layer(values, where)], StudentRun, unset=where)) from error
    except ValueError as error:
        raise ValueError(f"{where()}: {error}") from error
    if run.workers == 0:
        raise ValueError(f"{where()}: got workers=0, expected at least 1: Ray places the workers of a sweep")
    return run


def _group(config: SweepConfig) -> str:
    """What runs of one sweep share a service's work as."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(config.out).resolve().name)[:64]


def _points(grid: dict[str, list[Any]]) -> list[ConfigValues]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _named(key: str, value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{key.rpartition('.')[2]}-{value}")
