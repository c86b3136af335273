"""The target cache: Arrow IPC files of encoded targets, found by clip digest (DESIGN section 4, Target
cache)."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import xxhash
from typing_extensions import Buffer

from salt_distill.common.config import TargetDtype
from salt_distill.common.targets import codec
from salt_distill.common.targets.cells import Cells
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.whole import whole_file, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
"""What the name of a file begins with that is not whole yet."""
_BATCH_BYTES = 16_000_000
"""Targets of one record batch, in bytes: few batches to open, and little to hold while writing."""
_DIGESTS = b"salt.digests"
"""Metadata of a record batch: xxh3-64 of its clip digests, by which rows are found. Rows have checksums of
their targets alone."""
REPAIR = "`salt-serve cache verify --repair` computes it again"
_CHECKSUM = "checksum"
"""Of a manifest: sha256 of all else in it, as canonical JSON."""
_FIELDS = (
    pa.field("clip_digest", pa.binary(32), nullable=False),
    pa.field("key", pa.string()),
    pa.field("view", pa.int64()),
    pa.field("target", pa.large_binary(), nullable=False),
    pa.field("scale", pa.large_binary()),
    pa.field("checksum", pa.uint64(), nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What every target of a cache has in common; two caches with equal specs hold equal bytes."""

    teacher: dict[str, Any]
    """``TeacherSpec.to_json()``: fingerprint, compute, target spec."""
    target_dtype: TargetDtype
    shape: tuple[int, int]
    """(n, d) of a target."""
    data_seed: int | None = None
    """This and what follows is None where clips came without it: targets that a service wrote through."""
    views: int | None = None
    """K: views per sample."""
    view: dict[str, Any] | None = None
    """``view_facts``: the view configuration, and the version of the way from a draw to a clip."""
    decoder: str | None = None
    """Library and version that decoded the videos."""
    index_hash: str | None = None
    """Of the data set's index."""
    split: str | None = None

    @property
    def fingerprint(self) -> str:
        """The teacher's."""
        return self.teacher["fingerprint"]

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"format": FORMAT, "fingerprint": self.fingerprint, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The spec in ``to_json``'s form. Raises ValueError for another format."""
        if values.get("format") != FORMAT:
            raise ValueError(f"got target cache format {values.get('format')!r}, expected {FORMAT}")
        rest = {name: value for name, value in values.items() if name not in ("format", "fingerprint")}
        return cls(**{**rest, "shape": tuple(rest["shape"])})


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
    schema = pa.schema(_FIELDS, metadata={"salt.cache": json.dumps(spec.to_json(), sort_keys=True)})
    num_rows = 0
    with whole_file(path) as partial, pa.ipc.new_file(str(partial), schema) as writer:
        for chunk in _chunks(rows, spec):
            digests = b"".join(row.clip_digest for row in chunk)
            writer.write_batch(
                _record_batch(schema, chunk), custom_metadata={_DIGESTS: xxhash.xxh3_64_hexdigest(digests)}
            )
            num_rows += len(chunk)
    return num_rows


def write_manifest(
    root: Path, spec: CacheSpec, listed: dict[str, dict[str, Any]], skipped: Iterable[str]
) -> None:
    """Writes ``manifest.json``, the last file of a cache. ``listed``: ``listing`` of each file; ``skipped``:
    samples that do not decode."""
    replace_manifest(root, {**spec.to_json(), "files": listed, "skipped": sorted(skipped)})


def replace_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest whole, in place of the one that is there."""
    content = json.dumps({**manifest, _CHECKSUM: _checksum(manifest)}, indent=2, sort_keys=True)
    write_whole(root / MANIFEST, content, synced=True)


def read_manifest(root: Path, place: str | None = None) -> dict[str, Any]:
    """The manifest of a cache. Raises ValueError where there is none, CorruptTargetError where it is not as
    it was written.

    ``place``: where the cache is, if ``root`` only has a copy of the manifest.
    """
    path, called = root / MANIFEST, f"{place or root}/{MANIFEST}"
    if not path.is_file():
        raise ValueError(
            f"got {place or root}, expected a target cache with a {MANIFEST}: `salt-serve precompute` writes"
            " it last, so let it finish"
        )
    try:
        manifest = json.loads(path.read_text())
        checksum = manifest.pop(_CHECKSUM, None)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise CorruptTargetError(
            f"{called} is damaged: {error}. `salt-serve cache verify --repair` restores it"
        ) from error
    if checksum != _checksum(manifest):
        raise CorruptTargetError(
            f"{called} is damaged: it is not what was written. `salt-serve cache verify --repair` restores it"
        )
    return manifest


def listing(path: Path, num_rows: int) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"rows": num_rows, "sha256": sha256_of_file(path)}


def difference(found: dict[str, Any], listed: dict[str, Any]) -> str:
    """How a file is not what a manifest says of it."""
    return (
        f"got {found['rows']} rows with sha256 {found['sha256']}, expected {listed['rows']} with"
        f" {listed['sha256']}"
    )


class _Encoded:
    """The targets of a record batch, where they lie in the file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._targets, self._scales = Cells(batch.column("target")), Cells(batch.column("scale"))
        self._checksums = np.frombuffer(batch.column("checksum").buffers()[1], dtype="<u8", count=len(batch))

    def __getitem__(self, row_idx: int) -> EncodedTarget:
        target = self._targets[row_idx]
        assert target is not None, "the schema has no null targets"
        return EncodedTarget(
            target=target, scale=self._scales[row_idx], checksum=int(self._checksums[row_idx])
        )


class CacheFile:
    """A memory-mapped cache file. Raises CorruptTargetError where it cannot be opened, ValueError where it
    holds targets of another spec."""

    def __init__(self, path: Path, spec: CacheSpec, called: str | None = None) -> None:
        """``called``: where the file is, if ``path`` only has a copy of it."""
        self._called, self._spec = called or str(path), spec
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            read = [
                reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)
            ]
        except (pa.ArrowException, OSError) as error:
            raise CorruptTargetError(
                f"{self._called}: got no readable cache file ({error}): {REPAIR}"
            ) from error
        self._batches = [batch for batch, _ in read]
        self._hashes = [(metadata or {}).get(_DIGESTS, b"none").decode() for _, metadata in read]
        if reader.schema.names != [field.name for field in _FIELDS] or reader.schema.types != [
            field.type for field in _FIELDS
        ]:
            raise ValueError(
                f"{self._called}: got the columns {reader.schema.names}, expected"
                f" {[field.name for field in _FIELDS]}"
            )
        found = json.loads((reader.schema.metadata or {}).get(b"salt.cache", b"{}"))
        if different := [name for name, value in spec.to_json().items() if found.get(name) != value]:
            name = different[0]
            raise ValueError(
                f"{self._called}: got targets with {name}={found.get(name)}, expected {spec.to_json()[name]}:"
                " precompute into an empty folder, or repeat the command that began this one"
            )
        self._starts: list[int] = np.cumsum([0] + [len(batch) for batch in self._batches]).tolist()
        self._encoded = dict[int, _Encoded]()
        """Of the record batches that were read from: a file has many, and a run may need few."""

    def __len__(self) -> int:
        return self._starts[-1]

    def digests(self) -> np.ndarray:
        """The clip digest of each row: uint8 [rows, 32]. Raises CorruptTargetError where they are not those
        that were written."""
        columns = [batch.column("clip_digest") for batch in self._batches]
        cells = [
            np.frombuffer(column.buffers()[1], dtype=np.uint8)[: len(column) * 32].reshape(-1, 32)
            for column in columns
        ]
        for number, (digests, written) in enumerate(zip(cells, self._hashes, strict=True)):
            if (found := xxhash.xxh3_64_hexdigest(digests.data)) != written:
                raise CorruptTargetError(
                    f"{self._called}, record batch {number}: got clip digests with hash {found}, expected"
                    f" {written}: {REPAIR}"
                )
        return np.concatenate(cells) if cells else np.zeros((0, 32), dtype=np.uint8)

    def row(self, number: int) -> CacheRow:
        """One row; its bytes stay in the file. Its checksum is not checked."""
        batch_idx, row_idx = self._place(number)
        batch = self._batches[batch_idx]
        digest, key, view = (batch.column(name)[row_idx].as_py() for name in ("clip_digest", "key", "view"))
        return CacheRow(clip_digest=digest, key=key, view=view, encoded=self.encoded(number))

    def encoded(self, number: int) -> EncodedTarget:
        """The target of one row; its bytes stay in the file. Its checksum is not checked."""
        batch_idx, row_idx = self._place(number)
        if batch_idx not in self._encoded:
            self._encoded[batch_idx] = _Encoded(self._batches[batch_idx])
        return self._encoded[batch_idx][row_idx]

    def _place(self, number: int) -> tuple[int, int]:
        """The record batch of a row, and the row in it."""
        batch_idx = bisect_right(self._starts, number) - 1
        return batch_idx, number - self._starts[batch_idx]

    def check(self) -> tuple[list[CacheRow], list[CorruptTargetError]]:
        """After reading all of it: the rows whose targets are whole, and what is wrong with the others and
        with the digests."""
        rows, damage = list[CacheRow](), list[CorruptTargetError]()
        try:
            self.digests()
        except CorruptTargetError as error:
            damage.append(
                error
            )  # a row with a wrong digest is no clip's, so it does no harm among the whole ones
        for number in range(len(self)):
            row = self.row(number)
            try:
                codec.verify(
                    row.encoded,
                    self._spec.target_dtype,
                    num_tokens=self._spec.shape[0],
                    width=self._spec.shape[1],
                )
            except CorruptTargetError as error:
                damage.append(
                    CorruptTargetError(
                        f"{self._called}, row {number}, sample {row.key}, view {row.view}: {error}"
                    )
                )
            else:
                rows.append(row)
        return rows, damage


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


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _bytes(data: Buffer) -> bytes:
    return bytes(memoryview(data))


def sha256_of_file(path: Path) -> str:
    """Hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
