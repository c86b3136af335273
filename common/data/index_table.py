"""What is in ``index.parquet`` and ``dataset.json``, and the hash of it."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

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


class MixedSource(BaseModel, frozen=True):
    """A source of a mixture, which has its own order and passes."""

    name: str
    num_samples: int
    weight: float | None
    """Share in what is read, relative to the other weights; None for all sources: every sample is read
    equally often."""


class MixedFolder(BaseModel, frozen=True):
    """The data set that a mixture takes a source from."""

    path: str
    """Relative to the mixture."""
    index_hash: str
    """Of its index when the mixture was made."""
    removed: dict[str, int]
    """Samples that were not taken, by reason."""


class DatasetInfo(BaseModel, frozen=True):
    """``dataset.json``. What has a default stands there only where a data set has it."""

    format: Literal[1]
    name: str
    kind: Kind
    num_samples: int
    num_shards: int
    splits: dict[str, int]
    """Name -> samples."""
    class_names: dict[str, list[str]]
    """Label -> names of its classes; a label's value is a position in the list."""
    tars: dict[str, list[int]] = {}
    """Of tars that others packed: size and time of change, in nanoseconds, when they were indexed."""
    sources: tuple[MixedSource, ...] = ()
    """Of a mixture, and ``selections``."""
    selections: tuple[MixedFolder, ...] = ()
    index_hash: str
    """sha256 of the index's content, hex."""


def write_dataset(
    folder: Path,
    index: pa.Table,
    *,
    name: str,
    kind: Kind,
    class_names: dict[str, list[str]],
    tars: dict[str, list[int]] | None = None,
    sources: Sequence[MixedSource] = (),
    selections: Sequence[MixedFolder] = (),
) -> None:
    """Writes ``index.parquet``, then ``dataset.json``. Raises ValueError where a key is not unique."""
    seen: set[str] = set()
    for key in index["key"].to_pylist():
        if key in seen:
            raise ValueError(
                f"{folder}: two samples have the key {key!r}, expected a data set whose keys are unique"
            )
        seen.add(key)
    info = DatasetInfo(
        format=1,
        name=name,
        kind=kind,
        num_samples=len(index),
        num_shards=len(set(index["tar"].to_pylist())),
        splits=dict(sorted(Counter(index["split"].to_pylist()).items())),
        class_names=class_names,
        tars=tars or {},
        sources=tuple(sources),
        selections=tuple(selections),
        index_hash=index_hash(index),
    )
    with whole_file(folder / "index.parquet", synced=False, many_writers=True) as partial:
        pq.write_table(index, partial, compression="zstd")
    with whole_file(folder / "dataset.json", synced=False, many_writers=True) as partial:
        text = json.dumps(info.model_dump(exclude_defaults=True), indent=1, ensure_ascii=False)
        partial.write_text(text + "\n")


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
