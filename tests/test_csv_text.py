"""Tables of whatever names people give."""

import csv
import io

import pytest

from salt_distill.common.csv_text import csv_text


@pytest.mark.parametrize("dialect", ["excel", "excel-tab"])
def test_cells_come_back_as_they_were(dialect):
    cells = ("plain", "a\tb", "a,b", "a\nb", "a\rb", "a\r\n", "\\t", '"', 'a"b"', "", " ", "ä")
    rows = [tuple(cells[number:] + cells[:number]) for number in range(len(cells))]
    text = csv_text(rows, dialect=dialect)
    assert list(csv.reader(io.StringIO(text, newline=""), dialect=dialect)) == [list(row) for row in rows]
    assert csv_text([("a", 1, 0.5)]) == "a,1,0.5\n"
