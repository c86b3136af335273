"""``skipped.csv``: what a data set left out, and why."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from salt_distill.common.csv_text import csv_text

FILE_NAME = "skipped.csv"
_HEADER = ("path", "reason")


def write_skipped(folder: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """Writes (path, reason) rows, sorted by path."""
    (folder / FILE_NAME).write_text(csv_text([_HEADER, *sorted(skipped)]), encoding="utf-8", newline="")


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """(path, reason) of every video that was left out; none where there is no such file."""
    if not (folder / FILE_NAME).exists():
        return []
    with (folder / FILE_NAME).open(newline="", encoding="utf-8") as file:
        return [(path, reason) for path, reason in list(csv.reader(file))[1:]]


def printable(path: str | Path) -> str:
    """A path as text that every terminal and file takes: bytes that are not UTF-8 are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
