"""A data set on disk: WebDataset tars with an index that finds each sample without walking through them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32

from salt_distill.common.data.index import load_index
from salt_distill.common.data.index_table import DatasetInfo
from salt_distill.common.data.sample import Sample
from salt_distill.common.folders.folder import Folder
from salt_distill.common.folders.slice import Slice

_REPEATED = frozenset(["split", "codec", "source", "tar"])


@dataclass(frozen=True, kw_only=True)
class SourceWeight:
    """Samples that are read in an order and passes of their own: one of a mixture, or a whole data set that
    is none."""

    name: str
    """Empty for a whole data set."""
    weight: float | None
    """Share in what is read, relative to the other weights; None for all sources: every sample is read
    equally often."""


class Dataset:
    """Samples found by their place, and their encoded bytes. ``open_dataset`` makes one."""

    def __init__(self, folder: Folder, info: DatasetInfo, index: pa.Table) -> None:
        """``index``: as ``_compact`` makes it."""
        self.folder = folder
        self.name = info.name
        self.class_names = info.class_names
        """Label -> names of its classes; a label's value is a position in the list."""
        self.index_hash = info.index_hash
        """sha256 of the index's content, hex: equal for equal data sets, whatever wrote the files."""
        self.sources = [SourceWeight(name="", weight=None)]
        if info.kind == "mixture":
            self.sources = [SourceWeight(name=source.name, weight=source.weight) for source in info.sources]
        self._index = index
        tars = index["tar"].chunk(0)
        of_source = np.zeros(len(index), np.int64)
        if info.kind == "mixture":
            place = {source.name: place for place, source in enumerate(self.sources)}
            named = index["source"].chunk(0)
            of_source = np.array([place[name] for name in named.dictionary.to_pylist()])[
                named.indices.to_numpy()
            ]
        # A shard is what one source has in one tar; they are numbered as they come in the index.
        pairs, first, shard = np.unique(
            of_source * len(tars.dictionary) + tars.indices.to_numpy(), return_index=True, return_inverse=True
        )
        order = np.argsort(first)
        shard = np.argsort(order)[shard]
        self.shard_sources: list[int] = (pairs[order] // len(tars.dictionary)).tolist()
        """For each shard the place of its source in ``sources``."""
        self.tars: list[str] = tars.dictionary.take(pa.array(pairs[order] % len(tars.dictionary))).to_pylist()
        """For each shard its tar, relative to the data set's folder."""
        self._rows = np.argsort(shard, kind="stable").astype(np.int32)
        self._shard = shard[self._rows].astype(np.int32)

    @property
    def shards(self) -> list[str]:
        """For each shard a name of its own."""
        names = [self.sources[source].name for source in self.shard_sources]
        return [
            f"{name}--{PurePosixPath(tar).name}" if name else tar
            for name, tar in zip(names, self.tars, strict=True)
        ]

    @property
    def splits(self) -> list[str]:
        """Those that there are."""
        return self._index["split"].chunk(0).dictionary.to_pylist()

    def samples(
        self, split: str, *, but: Sequence[int] | Int32[np.ndarray, " n"] = ()
    ) -> list["SamplesOfShard"]:
        """For each shard the samples of a split in it, maybe none; ``all`` takes every sample. ``but``: rows
        of the index that are left out."""
        splits, known = self._index["split"].chunk(0), self.splits
        if split not in ("all", *known):
            raise ValueError(
                f"{self.folder.address}: got split {split!r}, expected one of {', '.join(sorted(known))},"
                " or all"
            )
        mask = np.array([split in ("all", name) for name in known])[splits.indices.to_numpy()[self._rows]]
        mask &= ~np.isin(self._rows, but)
        rows, ends = (
            self._rows[mask],
            np.searchsorted(self._shard[mask], np.arange(len(self.tars)), side="right"),
        )
        return [SamplesOfShard(self, part) for part in np.split(rows, ends[:-1])]

    def take(self, rows: Int32[np.ndarray, " n"]) -> list[Sample]:
        """The samples in these rows of the index."""
        return [
            Sample(**row | {"labels": dict(row["labels"])})
            for row in self._index.take(pa.array(rows)).to_pylist()
        ]

    def keys(self, rows: Int32[np.ndarray, " n"]) -> list[str]:
        """The keys of the samples in these rows of the index."""
        return self._index["key"].take(pa.array(rows)).to_pylist()

    def encoded(self, sample: Sample) -> Slice | bytes:
        """Where the encoded bytes of a sample are, on this machine; else the bytes. Raises BadVideoError, and
        OSError where a store fails."""
        return self.folder.slice(sample.tar, sample.offset, sample.size)

    def read(self, sample: Sample) -> bytes:
        """The encoded bytes of a sample. Raises BadVideoError where they are not there."""
        encoded = self.encoded(sample)
        return encoded if isinstance(encoded, bytes) else encoded.read()


class SamplesOfShard(Sequence[Sample]):
    """Rows of the index as samples, made when asked for: a data set may have millions."""

    def __init__(self, dataset: Dataset, rows: Int32[np.ndarray, " n"]) -> None:
        self._dataset = dataset
        self.rows = rows
        """Of the index."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, idx: Any) -> Any:
        return (
            SamplesOfShard(self._dataset, self.rows[idx])
            if isinstance(idx, slice)
            else self._dataset.take(self.rows[[idx]])[0]
        )

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._dataset.take(self.rows))


def open_dataset(data: str | Path) -> Dataset:
    """The data set in a folder of shards, or in an object store; tars that others packed get their index
    here, on first use.

    Raises FileNotFoundError where there are no shards or some are missing, ValueError where index and
    description disagree.
    """
    folder = Folder(data)
    info, index = load_index(folder)
    dataset = Dataset(folder, info, _compact(index))
    del index
    pa.default_memory_pool().release_unused()  # three times what is kept, of a large index
    missing = folder.missing(dataset.tars)
    if missing:
        raise FileNotFoundError(
            f"{folder.address}: {len(missing)} of its {len(dataset.tars)} shards are not there, the first is"
            f" {folder.path(missing[0])}: copy them anew, or pack again"
        )
    return dataset


def _compact(index: pa.Table) -> pa.Table:
    """The same in one chunk, since rows are taken from it all the time, with the strings that repeat by
    number: 3.6 million samples in 0.9 GB."""
    columns = {name: index[name].combine_chunks() for name in index.column_names}
    return pa.table(
        {
            name: column.dictionary_encode() if name in _REPEATED else column
            for name, column in columns.items()
        }
    )
