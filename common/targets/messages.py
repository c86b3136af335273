"""What an Arrow IPC stream declares, looked at before Arrow acts on it: a few bytes may stand for any amount
of memory."""

import struct

import pyarrow as pa

_MAX_METADATA_BYTES = 1 << 16
"""Of a message's description. Ours, of five columns at most, take about a thousand."""
_HEADER_FIELD, _COMPRESSION_FIELD = 2, 3
"""Places in the tables `Message` and `RecordBatch` of Arrow's format."""


class TooManyRowsError(ValueError):
    """A request of more rows than it may have."""


def check_stream(body: pa.Buffer, *, max_batches: int | None) -> None:
    """Raises ValueError where a stream holds what ours never do, TooManyRowsError, and pa.ArrowException or
    OSError where it is none.

    Compressed buffers (they may unfold to any size), dictionaries, long descriptions (columns by the
    million), or more batches than rows.
    """
    reader = pa.ipc.MessageReader.open_stream(body)
    for number, message in enumerate(iter(lambda: _next(reader), None)):
        if message.metadata.size > _MAX_METADATA_BYTES:
            raise ValueError(
                f"got a description of {message.metadata.size} bytes, expected at most {_MAX_METADATA_BYTES}"
            )
        if message.type != ("record batch" if number else "schema"):
            raise ValueError(f"got a {message.type} message, expected a schema and then record batches")
        if max_batches is not None and number > max_batches:
            raise TooManyRowsError(f"more than {max_batches} record batches")
        if number and _is_compressed(message.metadata):
            raise ValueError(
                "got a compressed record batch, expected plain ones: pixels and targets do not shrink"
            )


def _next(reader: pa.ipc.MessageReader) -> pa.Message | None:
    try:
        return reader.read_next_message()
    except StopIteration:
        return None


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Whether the batch's table names a codec. Arrow has checked the flatbuffer; pyarrow does not show this
    part of it."""
    described = memoryview(metadata)
    header = _field(described, _uint32(described, 0), _HEADER_FIELD)
    return (
        header is not None
        and _field(described, header + _uint32(described, header), _COMPRESSION_FIELD) is not None
    )


def _field(described: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table is; None where it is left out."""
    vtable = table - struct.unpack_from("<i", described, table)[0]
    [size] = struct.unpack_from("<H", described, vtable)
    place = 4 + 2 * number
    [offset] = struct.unpack_from("<H", described, vtable + place) if place < size else (0,)
    return table + offset if offset else None


def _uint32(described: memoryview, place: int) -> int:
    return struct.unpack_from("<I", described, place)[0]
