"""What the study's commands found: a file with a line for each. The page and its figures are made of it."""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.experiment import Lengths


class RecordError(ValueError):
    """A file that is no record of this study."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Of a command that ended well."""

    wall_s: float
    cpu_s: float
    """Of all its processes and threads, the start that ended it; what a killed start took is not counted."""
    day: str
    """On which it ended, as YYYY-MM-DD."""
    machine: str
    found: dict[str, Any]
    """What later commands and the page ask for; `Job.found` has it."""


class Record(Mapping[str, Entry]):
    """By the name of a job what it found, in a file that can be kept where the runs are not: in a repository,
    or on another machine, whose study then goes on after these."""

    def __init__(self, path: Path, lengths: Lengths) -> None:
        """Reads ``path``; without it the record is empty, and the first entry makes it.

        Raises RecordError where it has runs of other lengths, or a line that is not whole.
        """
        self.path = path
        # Results of other lengths are others; more seeds are only more.
        self.lengths = {name: getattr(lengths, name) for name in ("steps", "videos", "probe_epochs")}
        self._entries: dict[str, Entry] = {}
        if not path.exists():
            return
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                fields = json.loads(line)
                if number > 1:
                    name = fields.pop("name")
                    self._entries[name] = Entry(**fields)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RecordError(
                    f"got {path}, line {number}: {line[:60]!r}, expected the JSON of one command; delete the"
                    " line, and the command runs again"
                ) from error
            if number == 1 and fields != self.lengths:
                raise RecordError(
                    f"got {path} with runs of {fields}, expected {self.lengths}; give another --page, the"
                    " record lies beside it"
                )

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, *, wall_s: float, cpu_s: float, found: dict[str, Any]) -> None:
        """Also writes it."""
        entry = Entry(
            wall_s=round(wall_s, 1),
            cpu_s=round(cpu_s, 1),
            day=f"{date.today():%Y-%m-%d}",
            machine=_machine(),
            found=found,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = "" if self.path.exists() else json.dumps(self.lengths) + "\n"
        with self.path.open("a") as file:
            file.write(head + json.dumps({"name": name} | asdict(entry)) + "\n")
        self._entries[name] = entry


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores ({platform.machine()}), {device}, torch {torch.__version__}"
