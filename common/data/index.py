"""The index of a data set: written from the sidecars in its tars."""

import contextlib
import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.scan import probe_place, scan
from salt_distill.common.data.skipped import write_skipped
from salt_distill.common.folders.folder import Folder
from salt_distill.common.whole import whole_file

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 600.0
"""Longest that a video in a tar that others packed may take to decode."""
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


def write_index(folder: Path, *, name: str, kind: Kind, class_names: dict[str, list[str]]) -> None:
    """Writes ``index.parquet``, then ``dataset.json``, for the tars in a folder, from their sidecars.

    Videos without one are probed. Those that cannot be used are left out, and named in ``skipped.csv`` where
    ``kind`` is indexed.
    """
    skipped: list[tuple[str, str]] = []
    tables = [SCHEMA.empty_table()]
    with contextlib.closing(
        DecodePool(os.cpu_count() or 1, timeout_s=_PROBE_TIMEOUT_S, call=probe_place)
    ) as pool:
        for tar in sorted(folder.glob("*.tar")):
            try:
                tables.append(_table(scan(tar, name, skipped, pool)))
            except tarfile.TarError as error:
                raise ValueError(
                    f"{tar}: got no whole tar ({error}), expected an uncompressed one: copy it anew, or take"
                    " it away"
                ) from error
    for key, reason in skipped:
        logger.warning("%s: left %s out of the index: %s", folder, key, reason)
    index = pa.concat_tables(tables)
    if not len(index):
        raise ValueError(
            f"{folder}: got no video that can be decoded in its tars, expected members such as 000001.mp4"
        )
    if kind == "indexed":
        write_skipped(folder, skipped)
    write_dataset(
        folder, index, name=name, kind=kind, class_names=_all_class_names(class_names, index), more={}
    )


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


def load_index(data: str | Path | Folder) -> tuple[dict[str, Any], pa.Table]:
    """``dataset.json`` and ``index.parquet`` of a folder of shards; tars that others packed get them here, on
    first use.

    Raises FileNotFoundError where there are no shards, ValueError where the two disagree.
    """
    folder = data if isinstance(data, Folder) else Folder(data)
    try:
        info = json.loads(folder.read("dataset.json"))
    except FileNotFoundError:
        if folder.local is None:
            raise FileNotFoundError(
                f"{folder.address}: got no dataset.json in it, expected a folder that `salt-data pack` wrote"
            ) from None
        if not any(folder.local.glob("*.tar")):
            raise FileNotFoundError(
                f"{folder.address}: got no dataset.json and no tar in it, expected a folder that `salt-data"
                " pack` wrote"
            ) from None
        write_index(folder.local, name=folder.local.resolve().name, kind="indexed", class_names={})
        info = json.loads(folder.read("dataset.json"))
    index = pq.read_table(pa.BufferReader(folder.read("index.parquet")))
    if "seekable" not in index.column_names:  # of an older version
        index = index.append_column("seekable", pa.nulls(len(index), pa.bool_()))
    index = index.select(SCHEMA.names).cast(SCHEMA)
    if index["seekable"].null_count:
        logger.warning(
            "%s: it was packed by a version that did not note how frames can be found, so videos are decoded"
            " twice: pack it again to read it faster",
            folder.address,
        )
    if index_hash(index) != info["index_hash"]:
        raise ValueError(
            f"{folder.address}: index.parquet is not the one that dataset.json describes: delete both to have"
            " them made anew"
        )
    for selection in info["selections"] if info["kind"] == "mixture" else ():
        _require_same(folder, selection)
    return info, index


def _require_same(folder: Folder, selection: dict[str, Any]) -> None:
    """A mixture points into the tars of its sources, so they must be those that it was made of."""
    source = folder.path(selection["path"])
    try:
        found = json.loads(folder.read(f"{selection['path']}/dataset.json"))["index_hash"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder.address} is a mixture of {source}, which is not there: move sources and mixture"
            " together"
        ) from None
    if found != selection["index_hash"]:
        raise ValueError(
            f"{folder.address} is a mixture of {source}, which was packed anew since: run `salt-data mix`"
            " again"
        )


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


def _table(samples: Iterable[Sample]) -> pa.Table:
    """Rows of the index; a table per tar, since a sample as an object takes ten times the memory."""
    return pa.Table.from_pylist(
        [asdict(sample) | {"labels": list(sample.labels.items())} for sample in samples], schema=SCHEMA
    )


def _all_class_names(class_names: dict[str, list[str]], index: pa.Table) -> dict[str, list[str]]:
    """Names for every label in the index: numbers where none were given."""
    largest: dict[str, int] = {}
    for labels in index["labels"].to_pylist():
        for label, value in labels:
            largest[label] = max(value, largest.get(label, 0))
    return class_names | {
        label: [str(value) for value in range(largest[label] + 1)]
        for label in sorted(set(largest) - set(class_names))
    }
