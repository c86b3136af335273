"""A file of a target cache: an Arrow IPC file of encoded targets, found by clip digest (DESIGN section 4,
Target cache)."""

import itertools
import json
import os
import stat
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from typing_extensions import Buffer

from salt_distill.common.targets import codec
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.targets.manifest import REPAIR, CacheSpec
from salt_distill.common.whole import whole_file

_BATCH_BYTES = 16_000_000
"""Targets of one record batch, in bytes: few batches to open, and little to hold while writing."""
_DIGESTS = b"salt.digests"
"""Metadata of a record batch: xxh3-64 of its clip digests, by which rows are found. Rows have checksums of
their targets alone."""
_FIELDS = (
    pa.field("clip_digest", pa.binary(32), nullable=False),
    pa.field("key", pa.string()),
    pa.field("view", pa.int64()),
    pa.field("target", pa.large_binary(), nullable=False),
    pa.field("scale", pa.large_binary()),
    pa.field("checksum", pa.uint64(), nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class CacheRow:
    """One cached target."""

    clip_digest: bytes
    key: str | None
    """The sample it was made from, where known."""
    view: int | None
    """The view number it was made from, where known."""
    encoded: EncodedTarget


def file_path(spec: CacheSpec, view: int, shard: str) -> str:
    """Where the targets of one view of one shard are, relative to the cache."""
    return f"{spec.fingerprint}/view-{view}/{Path(shard).stem}.arrow"


def write_file(path: Path, spec: CacheSpec, rows: Iterable[CacheRow]) -> int:
    """Writes rows to a cache file; it appears whole or not at all. Returns their number."""
    with whole_file(path) as partial:
        return write_rows(partial, spec, rows)


def write_rows(partial: Path, spec: CacheSpec, rows: Iterable[CacheRow]) -> int:
    """Writes rows to the partial file of a cache file. Returns their number."""
    schema = pa.schema(_FIELDS, metadata={"salt.cache": json.dumps(spec.to_json(), sort_keys=True)})
    num_rows = 0
    with pa.ipc.new_file(str(partial), schema) as writer:
        for chunk in _chunks(rows, spec):
            digests = b"".join(row.clip_digest for row in chunk)
            writer.write_batch(
                _record_batch(schema, chunk), custom_metadata={_DIGESTS: xxhash.xxh3_64_hexdigest(digests)}
            )
            num_rows += len(chunk)
    return num_rows


def spec_of(path: Path) -> CacheSpec | None:
    """What a file says of itself, where it can be read."""
    try:
        _require_regular(path)
        with pa.OSFile(str(path)) as file:
            return CacheSpec.from_json(_description(pa.ipc.open_file(file).schema))
    except (pa.ArrowException, OSError, ValueError, RecursionError):
        return None  # whoever asks what is wrong with it names it


class _Column:
    """A column of a record batch: where its buffers lie in the file, as (offset, size) in bytes, None for one
    that it has not."""

    def __init__(self, column: pa.Array, file_address: int) -> None:
        self._type, self._num_rows = column.type, len(column)
        self._extents = [
            None if buffer is None else (buffer.address - file_address, buffer.size)
            for buffer in column.buffers()
        ]

    @property
    def cells(self) -> tuple[int, int]:
        """The last buffer's: of a large_binary column the cells, one after the other."""
        return self._extents[-1] or (0, 0)

    def read(self, descriptor: int) -> pa.Array:
        """All of it. Raises pa.ArrowInvalid where its offsets or texts are damaged."""
        column = pa.Array.from_buffers(self._type, self._num_rows, self._buffers(descriptor, self._extents))
        column.validate(full=True)
        return column

    def offsets(self, descriptor: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a large_binary column: where each cell begins and the last one ends, within ``cells``; and which
        cells are not null."""
        validity, offsets = self._buffers(descriptor, self._extents[:2])
        is_valid = np.ones(self._num_rows, dtype=bool)
        if validity is not None:
            bits = np.unpackbits(np.frombuffer(validity, dtype=np.uint8), bitorder="little")
            is_valid = bits[: self._num_rows].astype(bool)
        return np.frombuffer(offsets, dtype="<i8", count=self._num_rows + 1), is_valid

    def _buffers(self, descriptor: int, extents: list[tuple[int, int] | None]) -> list[Any]:
        return [None if extent is None else pa.py_buffer(_read(descriptor, *extent)) for extent in extents]


class _Batch:
    """A record batch, of which nothing is read yet."""

    def __init__(
        self, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | None, file_address: int
    ) -> None:
        self.num_rows = len(batch)
        self.digests_hash = (metadata or {}).get(_DIGESTS, b"none").decode(errors="replace")
        self.columns = {
            name: _Column(column, file_address)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }


class _Targets:
    """Where the targets of a record batch lie."""

    def __init__(self, batch: _Batch, descriptor: int) -> None:
        self._descriptor = descriptor
        self._cells = {
            name: (*batch.columns[name].offsets(descriptor), *batch.columns[name].cells)
            for name in ("target", "scale")
        }
        self._checksums = np.frombuffer(
            _read(descriptor, *batch.columns["checksum"].cells), dtype="<u8", count=batch.num_rows
        )

    def __getitem__(self, row_idx: int) -> EncodedTarget:
        target = self._cell("target", row_idx)
        assert target is not None, "the schema has no null targets"
        return EncodedTarget(
            target=target, scale=self._cell("scale", row_idx), checksum=int(self._checksums[row_idx])
        )

    def _cell(self, name: str, row_idx: int) -> bytes | None:
        """Nothing where a damaged offset points outside."""
        offsets, is_valid, first, size = self._cells[name]
        if not is_valid[row_idx]:
            return None
        begin, end = offsets[row_idx : row_idx + 2].tolist()
        return _read(self._descriptor, first + begin, end - begin) if 0 <= begin <= end <= size else b""


class CacheFile:
    """A cache file that is open. Raises CorruptTargetError where it cannot be opened or read, ValueError
    where it holds targets of another spec.

    Note [read, not mapped]: targets are read, never mapped. A file that somebody cuts, or a disk that fails,
    is then an error here; under a mapping it is a signal that ends the process.
    """

    def __init__(self, path: Path, spec: CacheSpec, called: str | None = None) -> None:
        """``called``: where the file is, if ``path`` only has a copy of it."""
        self._called, self._spec = called or str(path), spec
        try:
            _require_regular(path)
            self._file = path.open("rb", buffering=0)
            self._batches, schema = _batches(path)
        except (pa.ArrowException, OSError) as error:
            raise CorruptTargetError(
                f"{self._called}: got no readable cache file ({error}): {REPAIR}"
            ) from error
        if schema.names != [field.name for field in _FIELDS] or schema.types != [
            field.type for field in _FIELDS
        ]:
            raise ValueError(
                f"{self._called}: got the columns {schema.names}, expected"
                f" {[field.name for field in _FIELDS]}"
            )
        described = _description(schema)
        for name, value in spec.to_json().items():
            if described.get(name) != value:
                raise ValueError(
                    f"{self._called}: got targets with {name}={described.get(name)}, expected {value}:"
                    " precompute"
                    " into an empty folder, or repeat the command that began this one"
                )
        self._starts: list[int] = np.cumsum([0] + [batch.num_rows for batch in self._batches]).tolist()
        self._targets = dict[int, _Targets]()
        """Of the record batches that were read from: a file has many, and a run may need few."""

    def __len__(self) -> int:
        return self._starts[-1]

    def digests(self) -> np.ndarray:
        """The clip digest of each row: uint8 [rows, 32]. Raises CorruptTargetError where they are not those
        that were written."""
        digests_of_batches = [np.zeros((0, 32), dtype=np.uint8)]
        for number, batch in enumerate(self._batches):
            with self._readable():
                data = _read(self._file.fileno(), *batch.columns["clip_digest"].cells)[: batch.num_rows * 32]
            if (got := xxhash.xxh3_64_hexdigest(data)) != batch.digests_hash:
                raise CorruptTargetError(
                    f"{self._called}, record batch {number}: got clip digests with hash {got}, expected"
                    f" {batch.digests_hash}: {REPAIR}"
                )
            digests_of_batches.append(np.frombuffer(data, dtype=np.uint8).reshape(-1, 32))
        return np.concatenate(digests_of_batches)

    def encoded(self, number: int) -> EncodedTarget:
        """The target of one row. Its checksum is not checked."""
        batch_idx = self._batch_of(number)
        with self._readable():
            if batch_idx not in self._targets:
                self._targets[batch_idx] = _Targets(self._batches[batch_idx], self._file.fileno())
            return self._targets[batch_idx][number - self._starts[batch_idx]]

    def undamaged(self, number: int) -> EncodedTarget:
        """The target of one row. Raises CorruptTargetError where it is not the one that was written."""
        encoded = self.encoded(number)
        num_tokens, width = self._spec.shape
        codec.verify(encoded, self._spec.target_dtype, num_tokens=num_tokens, width=width)
        return encoded

    def row(self, number: int) -> CacheRow:
        """One row, all of it. The target's checksum is not checked."""
        digest, key, view = next(self._names(self._batch_of(number), number))
        return CacheRow(clip_digest=digest, key=key, view=view, encoded=self.encoded(number))

    def rows(self, numbers: Iterable[int]) -> Iterator[CacheRow]:
        """These rows, in ascending order, with one of them in memory at a time."""
        for batch_idx, of_batch in itertools.groupby(numbers, self._batch_of):
            names = list(self._names(batch_idx))
            for number in of_batch:
                digest, key, view = names[number - self._starts[batch_idx]]
                yield CacheRow(clip_digest=digest, key=key, view=view, encoded=self.encoded(number))

    def check(self) -> tuple[list[int], list[CorruptTargetError]]:
        """After reading all of it: the rows whose targets are whole, and what is wrong with the others and
        with the digests."""
        whole, damage = list[int](), list[CorruptTargetError]()
        try:
            self.digests()
        except CorruptTargetError as error:
            damage.append(
                error
            )  # a row with a wrong digest is no clip's, so it does no harm among the whole ones
        for number in range(len(self)):
            try:
                self.undamaged(number)
                whole.append(number)
            except CorruptTargetError as error:
                _, key, view = next(self._names(self._batch_of(number), number))
                damage.append(
                    CorruptTargetError(f"{self._called}, row {number}, sample {key}, view {view}: {error}")
                )
        return whole, damage

    def _batch_of(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1

    def _names(
        self, batch_idx: int, number: int | None = None
    ) -> Iterator[tuple[bytes, str | None, int | None]]:
        """Digest, sample and view of the rows of a record batch, or of one row; None where they are
        damaged."""
        batch = self._batches[batch_idx]
        first, last = (0, batch.num_rows) if number is None else (number - self._starts[batch_idx], None)
        columns = []
        for name in ("clip_digest", "key", "view"):
            try:
                column = batch.columns[name].read(self._file.fileno())
            except (pa.ArrowException, OSError):
                column = pa.nulls(batch.num_rows)
            columns.append(column[first : first + 1 if last is None else last].to_pylist())
        return zip(*columns, strict=True)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise CorruptTargetError(
                f"{self._called}: it cannot be read any more ({error}): {REPAIR}"
            ) from error


def _require_regular(path: Path) -> None:
    """Raises OSError where a path is nothing that can be read to its end: of a named pipe already the opening
    may take for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")


def _batches(path: Path) -> tuple[list[_Batch], pa.Schema]:
    """Where everything in a file lies; of all that is mapped meanwhile, the descriptions of its record
    batches are looked at."""
    mapped = pa.memory_map(str(path)).read_buffer()
    reader = pa.ipc.open_file(mapped)
    batches = (reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches))
    return [_Batch(batch, metadata, mapped.address) for batch, metadata in batches], reader.schema


def _description(schema: pa.Schema) -> dict[str, Any]:
    """What a file says of its targets: ``CacheSpec.to_json``."""
    return json.loads((schema.metadata or {}).get(b"salt.cache", b"{}"))


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """A part of a file. Raises OSError where the file ends before."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # above 2 GiB the system gives less than it is asked for
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise OSError(f"it ends at byte {offset + len(data)}, expected {size - len(data)} more")
        data += more
    return data


def _chunks(rows: Iterable[CacheRow], spec: CacheSpec) -> Iterator[list[CacheRow]]:
    size = max(1, _BATCH_BYTES // codec.num_bytes(spec.target_dtype, *spec.shape))
    chunk: list[CacheRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _record_batch(schema: pa.Schema, rows: list[CacheRow]) -> pa.RecordBatch:
    values = {
        "clip_digest": [row.clip_digest for row in rows],
        "key": [row.key for row in rows],
        "view": [row.view for row in rows],
        "target": [_bytes(row.encoded.target) for row in rows],
        "scale": [None if row.encoded.scale is None else _bytes(row.encoded.scale) for row in rows],
        "checksum": [row.encoded.checksum for row in rows],
    }
    return pa.record_batch([pa.array(values[field.name], field.type) for field in schema], schema=schema)


def _bytes(data: Buffer) -> bytes:
    return bytes(memoryview(data))
