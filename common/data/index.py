"""The index of a data set: read, and written from the tars themselves."""

import contextlib
import logging
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from salt_distill.common.config import explain
from salt_distill.common.data.index_table import (
    SCHEMA,
    DatasetInfo,
    Kind,
    MixedFolder,
    index_hash,
    write_dataset,
)
from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.sample import CLASS
from salt_distill.common.data.scan import Scanned, Skipped, probe_place, scan
from salt_distill.common.data.skipped import printable, write_skipped
from salt_distill.common.folders.folder import Folder

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 600.0
"""Longest that a video in a tar that others packed may take to decode."""
_MOST_WARNINGS = 20
_MAKE_ANEW = (
    "copy it or pack it again; only of tars that others packed, delete dataset.json and index.parquet to have"
    " them made anew"
)
_COMPRESSED = [f"*.tar.{kind}" for kind in ("gz", "bz2", "xz", "zst", "lz4", "Z")] + [
    *("*.tgz", "*.tbz", "*.tbz2", "*.txz", "*.tzst"),
]


def write_index(folder: Path, *, name: str, kind: Kind, class_names: dict[str, list[str]]) -> None:
    """Writes ``index.parquet``, then ``dataset.json``, for the tars in a folder, from their sidecars.

    Videos without one are probed. What is in no sample is named with its reason: in ``skipped.csv`` where
    ``kind`` is indexed, and by a warning.
    """
    skipped: Skipped = []
    classes = _Classes()
    tables = [SCHEMA.empty_table()]
    keys: set[str] = set()
    stamps = _stamps(folder)
    with contextlib.closing(
        DecodePool(os.cpu_count() or 1, timeout_s=_PROBE_TIMEOUT_S, call=probe_place)
    ) as pool:
        for tar in sorted(folder.glob("*.tar")):
            if printable(tar.name) != tar.name:
                skipped.append((printable(tar.name), "its name is not UTF-8"))
                continue
            try:
                scanned = scan(tar, name, skipped, pool)
            except tarfile.TarError as error:
                raise ValueError(
                    f"{tar}: got no whole tar ({error}), expected an uncompressed one: copy it anew, or take"
                    " it away"
                ) from error
            if kind == "indexed":
                scanned = [entry for entry in scanned if _is_new(entry, keys, skipped)]
            tables.append(classes.table(scanned))
    skipped += [
        (printable(path.name), "it is compressed, expected a tar that can be read in place: uncompress it")
        for path in compressed_tars(folder)
    ]
    index = classes.finished(pa.concat_tables(tables), skipped)
    for path, reason in skipped[:_MOST_WARNINGS]:
        logger.warning("%s: left %s out of the index: %s", folder, path, reason)
    if len(skipped) > _MOST_WARNINGS:
        logger.warning("%s: left %d more out of the index", folder, len(skipped) - _MOST_WARNINGS)
    if not len(index):
        named = "".join(f"; {path}: {reason}" for path, reason in skipped[:3])
        raise ValueError(
            f"{folder}: got no video that can be decoded in its tars, expected members such as"
            f" 000001.mp4{named}"
        )
    if kind == "indexed":
        write_skipped(folder, skipped)
    names = _all_class_names({**classes.names, **class_names}, index)
    tars = stamps if kind == "indexed" else None
    write_dataset(folder, index, name=name, kind=kind, class_names=names, tars=tars)


def _is_new(entry: Scanned, keys: set[str], skipped: Skipped) -> bool:
    """Whether no sample before it has its key, as sidecars copied from elsewhere may have."""
    sample = entry.sample
    if sample.key in keys:
        reason = f"the sample at byte {sample.offset} has the key {sample.key!r} of one before it"
        skipped.append((sample.tar, reason))
        return False
    keys.add(sample.key)
    return True


class _Classes:
    """The classes whose names stand in ``.cls``: until all of them are known, a sample's label is the number
    below zero under which its name was met first."""

    def __init__(self) -> None:
        self._met: dict[str, int] = {}
        self._has_numbers = False
        self.names: dict[str, list[str]] = {}
        """Class names of the label ``class``, where they are names."""

    def table(self, scanned: Sequence[Scanned]) -> pa.Table:
        """Rows of the index; a table per tar, since a sample as an object takes ten times the memory."""
        rows = []
        for entry in scanned:
            labels = dict(entry.sample.labels)
            if entry.class_name is not None:
                labels[CLASS] = -1 - self._met.setdefault(entry.class_name, len(self._met))
            self._has_numbers |= labels.get(CLASS, -1) >= 0
            rows.append(asdict(entry.sample) | {"labels": list(labels.items())})
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def finished(self, index: pa.Table, skipped: Skipped) -> pa.Table:
        """The index with the labels of the names in their order; without the samples that have a name where
        others have a number."""
        if not self._met:
            return index
        labels = index["labels"].combine_chunks()
        values = labels.items.to_numpy()
        if self._has_numbers:
            named = np.zeros(len(index), bool)
            named[
                np.searchsorted(labels.offsets.to_numpy(), np.flatnonzero(values < 0), side="right") - 1
            ] = True
            met = list(self._met)
            for row in index.filter(pa.array(named)).select(["tar", "key", "labels"]).to_pylist():
                content = met[-1 - dict(row["labels"])[CLASS]].encode()
                reason = f"its .cls holds {content!r}, expected the number of its class, as others have it"
                skipped.append((f"{row['tar']}/{row['key'].split('/', 2)[2]}", reason))
            return index.filter(pa.array(~named))
        self.names = {CLASS: sorted(self._met)}
        final = np.array([self.names[CLASS].index(name) for name in self._met])
        values = np.where(values < 0, final[np.maximum(-1 - values, 0)], values)
        column = pa.MapArray.from_arrays(labels.offsets, labels.keys, pa.array(values))
        return index.set_column(SCHEMA.get_field_index("labels"), SCHEMA.field("labels"), column)


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


def compressed_tars(folder: Path) -> list[Path]:
    """Tars that cannot be read in place."""
    return sorted(path for pattern in _COMPRESSED for path in folder.glob(pattern))


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of change, in nanoseconds, of each tar in a folder, compressed ones too."""
    paths = [*sorted(folder.glob("*.tar")), *compressed_tars(folder)]
    status = {printable(path.name): path.stat() for path in paths}
    return {name: [entry.st_size, entry.st_mtime_ns] for name, entry in status.items()}


def load_index(data: str | Path | Folder) -> tuple[DatasetInfo, pa.Table]:
    """``dataset.json`` and ``index.parquet`` of a folder of shards; tars that others packed get them here, on
    first use.

    Raises FileNotFoundError where there are no shards, ValueError where the two disagree.
    """
    folder = data if isinstance(data, Folder) else Folder(data)
    try:
        info = _info(folder)
    except FileNotFoundError:
        if folder.local is None:
            raise FileNotFoundError(
                f"{folder.address}: got no dataset.json in it, expected a folder that `salt-data pack` wrote"
            ) from None
        if not any(folder.local.glob("*.tar")):
            compressed = compressed_tars(folder.local)
            if compressed:
                raise ValueError(
                    f"{folder.address}: got compressed tars only, the first is {compressed[0].name}, expected"
                    " uncompressed ones, which can be read in place: uncompress them"
                ) from None
            raise FileNotFoundError(
                f"{folder.address}: got no dataset.json and no tar in it, expected a folder that `salt-data"
                " pack` wrote"
            ) from None
        write_index(folder.local, name=folder.local.resolve().name, kind="indexed", class_names={})
        info = _info(folder)
    if info.kind == "indexed" and folder.local is not None:
        info = _index_anew_where_tars_changed(folder.local, info)
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
    if index_hash(index) != info.index_hash:
        raise ValueError(
            f"{folder.address}: index.parquet is not the one that dataset.json describes: {_MAKE_ANEW}"
        )
    for selection in info.selections:
        _require_same(folder, selection)
    return info, index


def _info(folder: Folder, name: str = "dataset.json") -> DatasetInfo:
    """That of a data set; ``name``: of its file, relative to the folder."""
    try:
        return DatasetInfo.model_validate_json(folder.read(name))
    except pydantic.ValidationError as error:
        raise ValueError(
            f"{folder.path(name)}: got a damaged file, expected what `salt-data` writes: {_MAKE_ANEW}"
            f" ({explain(error)})"
        ) from error


def _index_anew_where_tars_changed(folder: Path, info: DatasetInfo) -> DatasetInfo:
    """``dataset.json`` of a folder's tars as they are now. A copy that nobody may write to, whose tars have
    other times and the sizes that are known, is read by the index that came with it."""
    indexed, now = info.tars, _stamps(folder)
    if indexed == now:
        return info
    if not os.access(folder, os.W_OK) and _sizes(indexed) == _sizes(now):
        logger.warning(
            "%s: its tars have other times than its index knows, and the same sizes; nothing can be written"
            " there, so the index is used as it is",
            folder,
        )
        return info
    logger.warning("%s: its tars are not those of its index any more: it is made anew", folder)
    write_index(folder, name=info.name, kind="indexed", class_names={})
    return _info(Folder(folder))


def _sizes(stamps: dict[str, list[int]]) -> dict[str, int]:
    return {name: size for name, (size, _) in stamps.items()}


def _require_same(folder: Folder, selection: MixedFolder) -> None:
    """A mixture points into the tars of its sources, so they must be those that it was made of."""
    source = folder.path(selection.path)
    try:
        now = _info(folder, f"{selection.path}/dataset.json")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder.address} is a mixture of {source}, which is not there: move sources and mixture"
            " together"
        ) from None
    if now.index_hash != selection.index_hash:
        raise ValueError(
            f"{folder.address} is a mixture of {source}, which was packed anew since: run `salt-data mix`"
            " again"
        )
