"""Bytes as cells of Arrow columns and back, without a copy; a scalar's ``as_buffer`` makes one."""

import numpy as np
import pyarrow as pa
from typing_extensions import Buffer


def column_of(data: Buffer | None) -> pa.Array:
    """A large_binary column of one cell."""
    if data is None:
        return pa.nulls(1, pa.large_binary())
    offsets = np.array([0, memoryview(data).nbytes], dtype=np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


class Cells:
    """The cells of a large_binary column, where they lie; None where one is null, nothing where a damaged
    offset points outside.

    A cell costs less than with ``cell``, a column more.
    """

    def __init__(self, column: pa.Array) -> None:
        _, offsets, data = column.buffers()
        self._offsets = np.frombuffer(offsets, dtype="<i8", count=len(column) + 1, offset=8 * column.offset)
        self._data = memoryview(b"" if data is None else data)
        self._is_valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None

    def __getitem__(self, row_idx: int) -> memoryview | None:
        if self._is_valid is not None and not self._is_valid[row_idx]:
            return None
        start, end = self._offsets[row_idx : row_idx + 2].tolist()
        return self._data[start:end] if start >= 0 and end <= len(self._data) else self._data[:0]


def cell(column: pa.Array, row_idx: int) -> pa.Buffer | None:
    """One cell of a large_binary column, where it lies; None where it is null."""
    if column.null_count and not column[row_idx].is_valid:
        return None
    _, offsets, data = column.buffers()
    start, end = np.frombuffer(offsets, dtype="<i8", count=2, offset=8 * (column.offset + row_idx))
    return data.slice(int(start), int(end - start)) if data is not None else pa.py_buffer(b"")
