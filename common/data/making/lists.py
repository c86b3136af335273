"""Lists of videos: a CSV file with a header, or V-JEPA's lines of a path and a class number."""

import codecs
import csv
import io
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from salt_distill.common.data.sample import CLASS, MAX_CLASSES
from salt_distill.common.data.skipped import printable
from salt_distill.common.data.video import VIDEO_SUFFIXES

_SPLIT_WORDS = frozenset(
    [
        "train",
        "training",
        "val",
        "valid",
        "validation",
        "validate",
        "dev",
        "test",
        "testing",
        "eval",
        "holdout",
    ]
)
_SPLIT_COLUMNS = frozenset(["subset", "partition", "fold", "phase"])
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]+)(\.0*)?")


@dataclass(frozen=True)
class Row:
    """One video of a list."""

    path: str
    """As the list writes it."""
    labels: dict[str, str]
    """Label -> name of its class; a cell may be empty."""
    split: str | None

    @property
    def name(self) -> str:
        """The video's name in keys: the path, the same for all ways to write it."""
        return posixpath.normpath(self.path).lstrip("/")


def read_list(path: Path) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows of a list, and label -> class names. Raises ValueError with the line that is wrong."""
    text = read_text(path)
    header = [_plain(cell) for cell in next(csv.reader(text.splitlines()[:1]), [])]
    if "path" in header:
        rows, class_names = _from_csv(path, text)
    else:
        rows, class_names = _from_lines(path, text.splitlines())
    if not rows:
        raise ValueError(f"{path}: got no rows, expected a video per line")
    paths: dict[str, str] = {}
    for row in rows:
        if row.name in paths:
            raise ValueError(
                f"{path}: two rows have the path {row.path!r}, expected each video once"
                if row.path == paths[row.name]
                else f"{path}: two rows have the path {row.path!r}, once as {paths[row.name]!r}, expected"
                " each video once"
            )
        paths[row.name] = row.path
    return rows, class_names


def read_text(path: Path) -> str:
    """The text of a list. A byte order mark is Excel's; a path on disk may have bytes that are no UTF-8."""
    content = path.read_bytes()
    start = content[:1000]
    if content.startswith(_UTF16) or (b"\0" in start and (0 in (start[::2].count(0), start[1::2].count(0)))):
        raise ValueError(f"{path}: line 1: got a list in UTF-16, expected UTF-8: save it as CSV in UTF-8")
    if b"\0" in start:
        raise ValueError(
            f"{path}: got a file that is no text, expected a list of videos: to pack a video give its folder"
        )
    return content.decode("utf-8-sig", "surrogateescape")


def class_names_of(values: set[str]) -> list[str]:
    """Numbers in their order, else names in theirs; a label's value is its position in the list."""
    if all(_NUMBER.fullmatch(value) for value in values):
        return sorted(values, key=lambda value: (float(value), value))
    return sorted(values)


def _plain(cell: str) -> str:
    return cell.strip().casefold()


def _from_csv(path: Path, text: str) -> tuple[list[Row], dict[str, list[str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = [cell.strip() for cell in reader.fieldnames or []]
    columns = [_plain(cell) if _plain(cell) in ("path", "split") else cell for cell in columns]
    for column in columns:
        if columns.count(column) > 1:
            raise ValueError(f"{path}: line 1: got two columns {column!r}, expected a name for each")
    reader.fieldnames = columns
    labels = [column for column in columns if column not in ("path", "split")]
    rows = []
    for cells in reader:
        if None in cells or None in cells.values():
            raise ValueError(
                f"{path}: line {reader.line_num} has not as many cells as the header, which names"
                f" {len(columns)} columns: {', '.join(columns)}"
            )
        if any(printable(text) != text for text in (*labels, *(cells[label] for label in labels))):
            raise ValueError(
                f"{path}: line {reader.line_num}: got a label that is not UTF-8, expected the list to be"
                " saved as UTF-8"
            )
        if not cells["path"].strip():
            raise ValueError(f"{path}: line {reader.line_num}: got no path, expected a video per line")
        classes = {label: cells[label].strip() for label in labels}
        rows.append(
            Row(
                cells["path"],
                {label: name for label, name in classes.items() if name},
                (cells.get("split") or "").strip() or None,
            )
        )
    values = {label: {row.labels[label] for row in rows if label in row.labels} for label in labels}
    for label in labels:
        _require_no_split(path, label, values[label])
    return rows, {label: class_names_of(values[label]) for label in labels}


def _require_no_split(path: Path, label: str, values: set[str]) -> None:
    """Raises ValueError where a label's column looks like the split: validation rows would become
    training."""
    plain = _plain(label)
    if (
        "split" in plain
        or plain in _SPLIT_COLUMNS
        or (values and {_plain(value) for value in values} <= _SPLIT_WORDS)
    ):
        raise ValueError(
            f"{path}: line 1: got the column {label!r}, which looks like the split of a video, expected it as"
            " `split`: rename it, or take it away"
        )


def _from_lines(path: Path, lines: list[str]) -> tuple[list[Row], dict[str, list[str]]]:
    """V-JEPA's form: ``path label``, or ``path::label``. The label is what follows the last separator, so a
    path may have spaces."""
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        video, _, label = line.strip().rpartition("::" if "::" in line else " ")
        video = video.strip()
        if len(video) > 1 and video[0] == video[-1] == '"':
            video = video[1:-1]
        whole = _WHOLE_NUMBER.fullmatch(label.strip())
        if not video or whole is None or not 0 <= int(whole[1]) < MAX_CLASSES:
            raise ValueError(
                f"{path}: line {number}: got {_what_is_wrong(number, line.strip(), video, whole)}"
            )
        rows.append(Row(video, {CLASS: str(int(whole[1]))}, None))
    num_classes = 1 + max((int(row.labels[CLASS]) for row in rows), default=0)
    return rows, {
        CLASS: [str(number) for number in range(num_classes)]
    }  # its numbers mean the same in every list of the data set


def _what_is_wrong(number: int, line: str, video: str, label: re.Match[str] | None) -> str:
    """What stands in a line that is none of V-JEPA's."""
    if video and label is not None:
        return f"the class number {label[0]}, expected one from 0 to {MAX_CLASSES - 1:,}"
    for name, separator in (("tabs", "\t"), ("semicolons", ";")):
        if separator in line:
            return f"{line[:80]!r}, columns with {name} between them, expected commas: save it as CSV"
    known = (
        "V-JEPA's `path label` or `path::label` with the label a class number, or a CSV file whose first line"
        " names its columns: `path`, one per label, maybe `split`"
    )
    if number == 1 and posixpath.splitext(line)[1].lower() in VIDEO_SUFFIXES and "," not in line:
        return (
            f"{line[:80]!r}, a path without a label, expected the line `path` before such a list, or {known}"
        )
    return f"{line[:80]!r}, expected {known}"
