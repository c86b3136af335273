"""Lists of videos: a CSV file with a header, or V-JEPA's lines of a path and a class number."""

import csv
from dataclasses import dataclass
from pathlib import Path

from salt_distill.common.data.sample import CLASS, MAX_CLASSES
from salt_distill.common.data.skipped import printable


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
        """The video's name in keys."""
        return self.path.lstrip("/")


def read_list(path: Path) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows of a list, and label -> class names. Raises ValueError with the line that is wrong."""
    # A byte order mark is Excel's; a path on disk may have bytes that are no UTF-8.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        header = next(csv.reader(file), [])
        file.seek(0)
        rows, class_names = (
            _from_csv(path, csv.DictReader(file))
            if "path" in header
            else _from_lines(path, file.read().splitlines())
        )
    if not rows:
        raise ValueError(f"{path}: got no rows, expected a video per line")
    seen: set[str] = set()
    for row in rows:
        if row.name in seen:
            raise ValueError(f"{path}: two rows have the path {row.path!r}, expected each video once")
        seen.add(row.name)
    return rows, class_names


def class_names_of(values: set[str]) -> list[str]:
    """Numbers in their order, else names in theirs; a label's value is its position in the list."""
    return sorted(values, key=int) if all(value.isdecimal() for value in values) else sorted(values)


def _from_csv(path: Path, reader: "csv.DictReader[str]") -> tuple[list[Row], dict[str, list[str]]]:
    columns = reader.fieldnames or []
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
        rows.append(
            Row(
                cells["path"],
                {label: cells[label] for label in labels if cells[label]},
                cells.get("split") or None,
            )
        )
    return rows, {
        label: class_names_of({row.labels[label] for row in rows if label in row.labels}) for label in labels
    }


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
        if not video or not label.isdecimal() or int(label) >= MAX_CLASSES:
            raise ValueError(
                f"{path}: line {number}: got {line[:80]!r}, expected V-JEPA's `path label` or `path::label`"
                " with the label a class number, or a CSV file whose first line names its columns: `path`,"
                " one per label, maybe `split`"
            )
        rows.append(Row(video, {CLASS: str(int(label))}, None))
    num_classes = 1 + max((int(row.labels[CLASS]) for row in rows), default=0)
    return rows, {
        CLASS: [str(number) for number in range(num_classes)]
    }  # its numbers mean the same in every list of the data set
