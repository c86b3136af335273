"""The board: what the student runs say of themselves."""

import json
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt


class Progress(BaseModel):
    """Where a student run is. Body of ``POST /v1/runs/{id}/progress``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    step: NonNegativeInt
    """Optimizer steps done."""
    slot: NonNegativeInt
    """The next slot of the data order."""
    loss: float | None = None
    """Of this step."""
    flops: NonNegativeFloat | None = None
    """Spent so far, teacher forward included."""
    teacher_wait_ms: NonNegativeFloat | None = None
    """What this step waited for its targets, in milliseconds."""
    clips_per_s: NonNegativeFloat | None = None
    """Of the run, lately."""


class Board:
    """The runs that asked for targets or posted progress, in memory; optionally each post in a file too."""

    def __init__(self, max_runs: int, file: Path | None = None) -> None:
        self._max_runs, self._file = max_runs, file
        self._runs: OrderedDict[str, dict[str, Any]] = OrderedDict()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def post(self, run: str, progress: Progress) -> None:
        """Keeps a run's newest progress."""
        entry = self._entry(run)
        entry["progress"] = progress.model_dump()
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps({"run": run, "time_s": entry["seen_s"], **entry["progress"]}) + "\n")

    def served(self, run: str, *, clips: int, num_bytes: int) -> None:
        """Counts what a run was sent."""
        entry = self._entry(run)
        entry["clips_served"] += clips
        entry["bytes_out"] += num_bytes

    def runs(self) -> list[dict[str, Any]]:
        """Each run: id, clips_served, bytes_out, seen_s (seconds since 1970), progress or None. The one heard of last comes first."""
        return [{"id": run, **entry} for run, entry in reversed(self._runs.items())]

    def _entry(self, run: str) -> dict[str, Any]:
        entry = self._runs.setdefault(run, {"clips_served": 0, "bytes_out": 0, "seen_s": 0.0, "progress": None})
        self._runs.move_to_end(run)
        entry["seen_s"] = time.time()
        while len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
        return entry
