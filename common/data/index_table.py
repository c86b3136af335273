"""What is in ``index.parquet`` and ``dataset.json``, and the hash of it."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from salt_distill.common.whole import whole_file

Kind = Literal["packed", "indexed", "mixture"]
"""Who wrote a data set's index: `salt-data pack`, the first use of tars that others packed, `salt-data
mix`."""
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("labels", pa.map_(pa.string(), pa.int64()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("num_frames", pa.int64(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("width", pa.int64(), nullable=False),
        pa.field("height", pa.int64(), nullable=False),
        pa.field("duration_s", pa.float64(), nullable=False),
        pa.field("codec", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("seekable", pa.bool_()),
        pa.field("tar", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)
"""Columns of ``index.parquet``: the fields of a Sample."""


def write_dataset(
    folder: Path,
    index: pa.Table,
    *,
    name: str,
    kind: Kind,
    class_names: dict[str, list[str]],
    more: dict[str, Any],
) -> None:
    """Writes ``index.parquet``, then ``dataset.json`` with ``more`` in it. Raises ValueError where a key is
    not unique."""
    seen: set[str] = set()
    for key in index["key"].to_pylist():
        if key in seen:
            raise ValueError(
                f"{folder}: two samples have the key {key!r}, expected a data set whose keys are unique"
            )
        seen.add(key)
    info = {
        "format": 1,
        "name": name,
        "kind": kind,
        "num_samples": len(index),
        "num_shards": len(set(index["tar"].to_pylist())),
        "splits": dict(sorted(Counter(index["split"].to_pylist()).items())),
        "class_names": class_names,
        **more,
        "index_hash": index_hash(index),
    }
    with whole_file(folder / "index.parquet", synced=False, many_writers=True) as partial:
        pq.write_table(index, partial, compression="zstd")
    with whole_file(folder / "dataset.json", synced=False, many_writers=True) as partial:
        partial.write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n")


def index_hash(index: pa.Table) -> str:
    """sha256 of the index's content, hex: equal for equal data sets, whatever wrote the files and however
    they are cut into row groups."""
    hasher = hashlib.sha256()
    for name in SCHEMA.names:
        if index[name].null_count == len(index):  # what was added later is no content of an older data set
            continue
        hasher.update(name.encode())
        for parts in zip(*(_contents(chunk) for chunk in index[name].chunks), strict=True):
            for part in parts:
                hasher.update(part)
    return hasher.hexdigest()


def _contents(array: pa.Array) -> list[np.ndarray | memoryview]:
    """The values of a column's chunk as bytes: of strings and maps their lengths and what they hold. As
    Python objects a hash takes ten times longer."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8()).fill_null(-1)
    if not (isinstance(array, pa.MapArray) or pa.types.is_string(array.type)):
        return [np.ascontiguousarray(array.to_numpy())]
    offsets = np.frombuffer(array.buffers()[1] or bytes(4), np.int32)[
        array.offset : array.offset + len(array) + 1
    ]
    first, last = int(offsets[0]), int(offsets[-1])
    if isinstance(array, pa.MapArray):
        return [np.diff(offsets), *_contents(array.keys[first:last]), *_contents(array.items[first:last])]
    return [np.diff(offsets), memoryview(array.buffers()[2] or b"")[first:last]]
