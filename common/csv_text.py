"""Tables as text."""

import csv
from collections.abc import Iterable, Sequence
from typing import Literal


def csv_text(rows: Iterable[Sequence[object]], *, dialect: Literal["excel", "excel-tab"] = "excel") -> str:
    """CSV, or tab-separated values, that the csv module, pandas and spreadsheets read as it was: cells with
    separators, quotes or line breaks are quoted."""
    lines = _Lines()
    csv.writer(lines, dialect=dialect).writerows(rows)
    return "".join(lines.written)


class _Lines:
    """A file for ``csv.writer``, which gives it a row at a time. Rows end with "\\n" here, and not by the
    writer's ``lineterminator``: the writer then leaves a "\\r" in a cell without quotes."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, row: str) -> None:
        self.written.append(row.removesuffix("\r\n") + "\n")
