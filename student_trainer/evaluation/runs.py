"""Finished runs, read from their directories."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salt_distill.common.config import load_yaml
from salt_distill.student_trainer.run_directory import read_metrics


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory says."""

    name: str
    path: Path
    config: dict[str, Any]
    """``config.yaml``."""
    summary: dict[str, Any]
    """``summary.json``."""
    metrics: list[dict[str, Any]]
    """The lines of ``metrics.jsonl``."""

    @property
    def objective(self) -> str:
        """vpixel (a teacher), salt (a student of a frozen teacher) or vjepa."""
        return self.summary["objective"]

    @property
    def teacher_fingerprint(self) -> str | None:
        """The frozen teacher it learned from, if one."""
        teacher = self.summary["teacher"]
        return None if teacher is None else teacher["fingerprint"]


def is_run(path: Path) -> bool:
    """Whether a directory is a run's."""
    return (path / "config.yaml").is_file()


def find_runs(run_dirs: Sequence[str], folder: Path | None) -> tuple[list[Run], list[Path]]:
    """The finished runs among ``run_dirs`` and in ``folder``, teachers first, then by name, and the
    directories of unfinished ones.

    Raises ValueError where a named directory is no run, or nothing is found.
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
        paths += [
            path
            for path in sorted(folder.iterdir())
            if is_run(path) and path.resolve() not in {named.resolve() for named in paths}
        ]
    finished = [
        path for path in paths if (path / "summary.json").is_file() and (path / "metrics.jsonl").is_file()
    ]
    if not finished:
        raise ValueError(
            f"got {len(paths)} run directories of which none has finished, expected one with a summary.json"
        )
    runs = [_read(path) for path in finished]
    runs.sort(key=lambda run: (run.objective != "vpixel", run.name))
    return runs, [path for path in paths if path not in finished]


def read_json(path: Path | None) -> dict[str, Any] | None:
    """The object in a JSON file; None without a file."""
    if path is None or not path.is_file():
        return None
    loaded = json.loads(path.read_text())
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: got a JSON {type(loaded).__name__}, expected an object")
    return loaded


def read_seconds(path: Path | None) -> dict[str, float]:
    """Seconds per step of a script, from lines of STEP<TAB>SECONDS; empty without a file."""
    if path is None or not path.is_file():
        return {}
    seconds = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        step, separator, value = line.partition("\t")
        if not separator:
            raise ValueError(f"{path}, line {number}: got {line!r}, expected STEP<TAB>SECONDS")
        seconds[step] = float(value)
    return seconds


def _read(path: Path) -> Run:
    summary = read_json(path / "summary.json")
    assert summary is not None
    return Run(
        name=path.resolve().name,
        path=path,
        config=load_yaml(path / "config.yaml"),
        summary=summary,
        metrics=read_metrics(path),
    )
