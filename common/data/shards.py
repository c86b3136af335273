"""A data set on disk: WebDataset tars with an index that finds each sample without walking through them."""

import functools
import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.data.video import BadVideoError, VideoFacts, probe

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp"]
)
"""Names that are taken for videos, in lower case; the content decides whether they are."""

_SCHEMA = pa.schema(
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
        pa.field("tar", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One video of a data set."""

    key: str
    """``source/name``, unique over the data set."""
    labels: dict[str, int]
    split: str
    num_frames: int
    fps: float
    width: int
    """Pixels, as displayed."""
    height: int
    duration_s: float
    codec: str
    sha256: str
    """Of the encoded bytes, hex."""
    source: str
    tar: str
    """Relative to the data set's folder."""
    offset: int
    """Of the encoded bytes in the tar."""
    size: int
    """Of the encoded bytes."""


SIDECAR_FIELDS = tuple(field.name for field in fields(Sample) if field.name not in ("tar", "offset", "size"))
"""What the JSON beside a video in a tar holds (DESIGN section 4, Shards)."""


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
    if not (folder / "dataset.json").exists():
        if not any(folder.glob("*.tar")):
            raise FileNotFoundError(f"{folder}: got no dataset.json and no tar in it, expected a folder that `salt-data pack` wrote")
        write_index(folder, name=folder.resolve().name, class_names={})
    info = json.loads((folder / "dataset.json").read_text())
    index = pq.read_table(folder / "index.parquet", schema=_SCHEMA)
    if _hash_of(index) != info["index_hash"]:
        raise ValueError(f"{folder}: index.parquet is not the one that dataset.json describes: delete both to have them made anew")
    return Dataset(folder, info, index)


def write_index(folder: Path, *, name: str, class_names: dict[str, list[str]]) -> None:
    """Writes ``index.parquet``, then ``dataset.json``, for the tars in a folder, from their sidecars; videos without one are probed."""
    skipped: dict[str, str] = {}
    samples: list[Sample] = []
    for tar in sorted(folder.glob("*.tar")):
        try:
            samples += _scan(tar, name, skipped)
        except tarfile.TarError as error:
            raise ValueError(f"{tar}: got no whole tar ({error}), expected an uncompressed one: copy it anew, or take it away") from error
    for key, reason in skipped.items():
        logger.warning("%s: left %s out of the index: %s", folder, key, reason)
    if not samples:
        raise ValueError(f"{folder}: got no video that can be decoded in its tars, expected members such as 000001.mp4")
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise ValueError(f"{folder}: two samples have the key {sample.key!r}, expected a data set whose keys are unique")
        seen.add(sample.key)
    for label in sorted({label for sample in samples for label in sample.labels} - set(class_names)):
        num_classes = 1 + max(sample.labels.get(label, 0) for sample in samples)
        class_names = class_names | {label: [str(value) for value in range(num_classes)]}
    index = pa.Table.from_pylist([asdict(sample) | {"labels": list(sample.labels.items())} for sample in samples], schema=_SCHEMA)
    splits = sorted({sample.split for sample in samples})
    info = {
        "format": 1,
        "name": name,
        "num_samples": len(samples),
        "num_shards": len({sample.tar for sample in samples}),
        "splits": {split: sum(sample.split == split for sample in samples) for split in splits},
        "num_skipped": len(skipped),
        "class_names": class_names,
        "index_hash": _hash_of(index),
    }
    _replace(folder / "index.parquet", lambda path: pq.write_table(index, path, compression="zstd"))
    _replace(folder / "dataset.json", lambda path: path.write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n"))


def sidecar(sample_facts: dict[str, Any]) -> bytes:
    """The JSON beside a video in a tar."""
    assert tuple(sample_facts) == SIDECAR_FIELDS, f"got {tuple(sample_facts)}"
    return json.dumps(sample_facts, ensure_ascii=False).encode()


def _scan(tar: Path, source: str, skipped: dict[str, str]) -> Iterator[Sample]:
    """The samples of one tar; undecodable ones go to ``skipped``. Members belong together up to the first dot of their base name, as in WebDataset."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            stem, _, suffix = path.name.partition(".")
            if member.isfile() and stem:
                groups.setdefault(str(path.with_name(stem)), {})["." + suffix.lower()] = member
        for stem, members in groups.items():
            video = next((members[suffix] for suffix in members if suffix in VIDEO_SUFFIXES), None)
            if video is None:
                continue
            key = f"{source}/{stem}"
            try:
                facts = _own_sidecar(archive, members) or _foreign_facts(archive, members, video, key, source)
            except BadVideoError as error:
                skipped[key] = str(error)
            else:
                yield Sample(**facts, tar=tar.name, offset=video.offset_data, size=video.size)


def _own_sidecar(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, Any] | None:
    """The sidecar, where it is one of ours."""
    if ".json" not in members:
        return None
    try:
        facts = json.loads(_read(archive, members[".json"]))
    except ValueError as error:
        raise BadVideoError(f"its .json is not JSON ({error})") from error
    return facts if isinstance(facts, dict) and set(facts) == set(SIDECAR_FIELDS) else None


def _foreign_facts(
    archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], video: tarfile.TarInfo, key: str, source: str
) -> dict[str, Any]:
    data = _read(archive, video)
    labels = {}
    if ".cls" in members:
        label = _read(archive, members[".cls"]).strip()
        if not label.isdigit():
            raise BadVideoError(f"its .cls holds {label[:40]!r}, expected the number of its class")
        labels["class"] = int(label)
    return describe(key, data, probe(data), labels=labels, split="train", source=source)


def describe(key: str, data: bytes, facts: VideoFacts, *, labels: dict[str, int], split: str, source: str) -> dict[str, Any]:
    """The fields of a sidecar."""
    values = {"key": key, "labels": labels, "split": split, **asdict(facts), "sha256": hashlib.sha256(data).hexdigest(), "source": source}
    return {name: values[name] for name in SIDECAR_FIELDS}


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, f"{member.name} is no file"
    return file.read()


def _hash_of(index: pa.Table) -> str:
    hasher = hashlib.sha256()
    for name in _SCHEMA.names:
        hasher.update(json.dumps([name, index[name].to_pylist()], separators=(",", ":"), ensure_ascii=False).encode())
    return hasher.hexdigest()


def _replace(path: Path, write: Any) -> None:
    """Writes beside the path, then renames, so that no half of a file is ever read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)
