"""``skipped.csv``: what a data set left out, and why."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

FILE_NAME = "skipped.csv"
_HEADER = ("path", "reason")


def write_skipped(folder: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """Writes (path, reason) rows, sorted by path."""
    with (folder / FILE_NAME).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([_HEADER, *sorted(skipped)])


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """(path, reason) of every video that was left out; none where there is no such file."""
    if not (folder / FILE_NAME).exists():
        return []
    with (folder / FILE_NAME).open(newline="", encoding="utf-8") as file:
        return [(path, reason) for path, reason in list(csv.reader(file))[1:]]


def printable(path: str | Path) -> str:
    """A path as text that every terminal and file takes: bytes that are not UTF-8 are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
