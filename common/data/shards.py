"""A data set on disk: WebDataset tars with an index that finds each sample without walking through them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.data.facts import BadVideoError
from common.data.index import load_index
from common.data.sample import Sample


class Dataset:
    """Samples found by their place, and their encoded bytes. ``open_dataset`` makes one."""

    def __init__(self, folder: Path, info: dict[str, Any], index: pa.Table) -> None:
        self.folder = folder
        self.name: str = info["name"]
        self.class_names: dict[str, list[str]] = info["class_names"]
        """Label -> names of its classes; a label's value is a position in the list."""
        self.index_hash: str = info["index_hash"]
        """sha256 of the index's content, hex: equal for equal data sets, whatever wrote the files."""
        self._index = index

    @functools.cached_property
    def shards(self) -> list[str]:
        """The tars, in the order of the index."""
        return list(dict.fromkeys(self._index["tar"].to_pylist()))

    def samples(self, split: str) -> list[Sequence[Sample]]:
        """For each of ``shards`` the samples of a split in it, maybe none; ``all`` takes every sample."""
        rows: dict[str, list[int]] = {tar: [] for tar in self.shards}
        for row, (tar, its_split) in enumerate(zip(self._index["tar"].to_pylist(), self._index["split"].to_pylist(), strict=True)):
            if split in ("all", its_split):
                rows[tar].append(row)
        if not any(rows.values()):
            known = ", ".join(sorted(set(self._index["split"].to_pylist())))
            raise ValueError(f"{self.folder}: got split {split!r}, expected one of {known}, or all")
        return [_Rows(self._index, rows[tar]) for tar in self.shards]

    def read(self, sample: Sample) -> bytes:
        """The encoded bytes of a sample. Raises BadVideoError where the tar ends before them."""
        with open(self.folder / sample.tar, "rb") as tar:
            tar.seek(sample.offset)
            data = tar.read(sample.size)
        if len(data) != sample.size:
            raise BadVideoError(
                f"{sample.tar} has {len(data)} of its {sample.size} bytes, so the tar was cut or replaced after it was indexed"
            )
        return data


class _Rows(Sequence[Sample]):
    """Rows of the index as samples, made when asked for: a data set may have millions."""

    def __init__(self, index: pa.Table, rows: list[int]) -> None:
        self._index = index
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return _Rows(self._index, self._rows[idx])
        row = self._index.slice(self._rows[idx], 1).to_pylist()[0]
        return Sample(**row | {"labels": dict(row["labels"])})


def open_dataset(path: str | Path) -> Dataset:
    """The data set in a folder of shards; tars that others packed get their index here, on first use.

    Raises FileNotFoundError where there are no shards, ValueError where index and description disagree.
    """
    folder = Path(path)
    return Dataset(folder, *load_index(folder))
