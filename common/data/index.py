"""The index of a data set: written from the sidecars in its tars."""

import hashlib
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.data.facts import BadVideoError, VideoFacts
from common.data.skipped import write_skipped
from common.data.stills import IMAGE_SUFFIXES, content_hash, padded_size, stills_in
from common.data.video import probe

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp"]
)
"""Names that are taken for videos, in lower case; the content decides whether they are."""
_FRAME = re.compile(r"\.\d+(" + "|".join(sorted(IMAGE_SUFFIXES)).replace(".", r"\.") + ")")
"""What follows a sample's stem in the name of a frame."""

Kind = Literal["packed", "indexed", "mixture"]
"""Who wrote a data set's index: `salt-data pack`, the first use of tars that others packed, `salt-data mix`."""


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
    """Of the encoded bytes, hex; of a frame folder: of its images, one after the other."""
    source: str
    tar: str
    """Relative to the data set's folder."""
    offset: int
    """Of the encoded bytes in the tar."""
    size: int
    """Of the encoded bytes."""


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
        pa.field("tar", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)
"""Columns of ``index.parquet``: the fields of a Sample."""
SIDECAR_FIELDS = tuple(field.name for field in fields(Sample) if field.name not in ("tar", "offset", "size"))
"""What the JSON beside a video in a tar holds (DESIGN section 4, Shards)."""


def describe(key: str, sha256: str, facts: VideoFacts, *, labels: dict[str, int], split: str, source: str) -> dict[str, Any]:
    """The fields of a sidecar."""
    values = {"key": key, "labels": labels, "split": split, **asdict(facts), "sha256": sha256, "source": source}
    return {name: values[name] for name in SIDECAR_FIELDS}


def sha256_of(data: bytes) -> str:
    """A sample's ``sha256``."""
    return content_hash(stills_in(data) or [data])


def sidecar(sample_facts: dict[str, Any]) -> bytes:
    """The JSON beside a video in a tar."""
    assert tuple(sample_facts) == SIDECAR_FIELDS, f"got {tuple(sample_facts)}"
    return json.dumps(sample_facts, ensure_ascii=False).encode()


def write_index(folder: Path, *, name: str, kind: Kind, class_names: dict[str, list[str]]) -> None:
    """Writes ``index.parquet``, then ``dataset.json``, for the tars in a folder, from their sidecars.

    Videos without one are probed. Those that cannot be used are left out, and named in ``skipped.csv`` where ``kind`` is indexed.
    """
    skipped: list[tuple[str, str]] = []
    tables = [SCHEMA.empty_table()]
    for tar in sorted(folder.glob("*.tar")):
        try:
            tables.append(_table(_scan(tar, name, skipped)))
        except tarfile.TarError as error:
            raise ValueError(f"{tar}: got no whole tar ({error}), expected an uncompressed one: copy it anew, or take it away") from error
    for key, reason in skipped:
        logger.warning("%s: left %s out of the index: %s", folder, key, reason)
    index = pa.concat_tables(tables)
    if not len(index):
        raise ValueError(f"{folder}: got no video that can be decoded in its tars, expected members such as 000001.mp4")
    if kind == "indexed":
        write_skipped(folder, skipped)
    write_dataset(folder, index, name=name, kind=kind, class_names=_all_class_names(class_names, index), more={})


def write_dataset(folder: Path, index: pa.Table, *, name: str, kind: Kind, class_names: dict[str, list[str]], more: dict[str, Any]) -> None:
    """Writes ``index.parquet``, then ``dataset.json`` with ``more`` in it. Raises ValueError where a key is not unique."""
    seen: set[str] = set()
    for key in index["key"].to_pylist():
        if key in seen:
            raise ValueError(f"{folder}: two samples have the key {key!r}, expected a data set whose keys are unique")
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
    _replace(folder / "index.parquet", lambda path: pq.write_table(index, path, compression="zstd"))
    _replace(folder / "dataset.json", lambda path: path.write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n"))


def load_index(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    """``dataset.json`` and ``index.parquet`` of a folder of shards; tars that others packed get them here, on first use.

    Raises FileNotFoundError where there are no shards, ValueError where the two disagree.
    """
    if not (folder / "dataset.json").exists():
        if not any(folder.glob("*.tar")):
            raise FileNotFoundError(f"{folder}: got no dataset.json and no tar in it, expected a folder that `salt-data pack` wrote")
        write_index(folder, name=folder.resolve().name, kind="indexed", class_names={})
    info = json.loads((folder / "dataset.json").read_text())
    index = pq.read_table(folder / "index.parquet", schema=SCHEMA)
    if index_hash(index) != info["index_hash"]:
        raise ValueError(f"{folder}: index.parquet is not the one that dataset.json describes: delete both to have them made anew")
    for selection in info["selections"] if info["kind"] == "mixture" else ():
        _require_same(folder, selection)
    return info, index


def _require_same(folder: Path, selection: dict[str, Any]) -> None:
    """A mixture points into the tars of its sources, so they must be those that it was made of."""
    description = folder / selection["path"] / "dataset.json"
    if not description.exists():
        raise FileNotFoundError(f"{folder} is a mixture of {description.parent}, which is not there: move sources and mixture together")
    if json.loads(description.read_text())["index_hash"] != selection["index_hash"]:
        raise ValueError(f"{folder} is a mixture of {description.parent}, which was packed anew since: run `salt-data mix` again")


def index_hash(index: pa.Table) -> str:
    """sha256 of the index's content, hex: equal for equal data sets, whatever wrote the files and however they are cut into row groups."""
    hasher = hashlib.sha256()
    for name in SCHEMA.names:
        hasher.update(name.encode())
        for parts in zip(*(_contents(chunk) for chunk in index[name].chunks), strict=True):
            for part in parts:
                hasher.update(part)
    return hasher.hexdigest()


def _contents(array: pa.Array) -> list[np.ndarray | memoryview]:
    """The values of a column's chunk as bytes: of strings and maps their lengths and what they hold. As Python objects a hash takes ten times longer."""
    if not (isinstance(array, pa.MapArray) or pa.types.is_string(array.type)):
        return [np.ascontiguousarray(array.to_numpy())]
    offsets = np.frombuffer(array.buffers()[1] or bytes(4), np.int32)[array.offset : array.offset + len(array) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    if isinstance(array, pa.MapArray):
        return [np.diff(offsets), *_contents(array.keys[first:last]), *_contents(array.items[first:last])]
    return [np.diff(offsets), memoryview(array.buffers()[2] or b"")[first:last]]


def _table(samples: Iterable[Sample]) -> pa.Table:
    """Rows of the index; a table per tar, since a sample as an object takes ten times the memory."""
    return pa.Table.from_pylist([asdict(sample) | {"labels": list(sample.labels.items())} for sample in samples], schema=SCHEMA)


def _all_class_names(class_names: dict[str, list[str]], index: pa.Table) -> dict[str, list[str]]:
    """Names for every label in the index: numbers where none were given."""
    largest: dict[str, int] = {}
    for labels in index["labels"].to_pylist():
        for label, value in labels:
            largest[label] = max(value, largest.get(label, 0))
    return class_names | {label: [str(value) for value in range(largest[label] + 1)] for label in sorted(set(largest) - set(class_names))}


def _scan(tar: Path, source: str, skipped: list[tuple[str, str]]) -> Iterator[Sample]:
    """The samples of one tar; those that cannot be used go to ``skipped``. Members belong together up to the first dot of their base name, as in WebDataset."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            stem, _, suffix = path.name.partition(".")
            if member.isfile() and stem:
                groups.setdefault(str(path.with_name(stem)), {})["." + suffix.lower()] = member
        for stem, members in groups.items():
            key = f"{source}/{tar.stem}/{stem}"  # others count anew in every tar
            try:
                place = _place_of(members)
                if place is not None:
                    facts = _own_sidecar(archive, members) or _foreign_facts(archive, members, place, key, source)
                    yield Sample(**facts, tar=tar.name, offset=place[0], size=place[1])
            except BadVideoError as error:
                skipped.append((f"{tar.name}/{stem}", str(error)))


def _place_of(members: dict[str, tarfile.TarInfo]) -> tuple[int, int] | None:
    """(offset, size) of a sample's encoded bytes in the tar; None where no member is a video or an image."""
    suffixes = [suffix for suffix in members if suffix in VIDEO_SUFFIXES] or [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if suffixes:
        return members[suffixes[0]].offset_data, members[suffixes[0]].size
    frames = [member for suffix, member in members.items() if _FRAME.fullmatch(suffix)]
    if frames:
        start = frames[0].offset
        for frame in frames:
            if frame.offset != start:
                raise BadVideoError(f"its frame {frame.name} does not follow the frame before it in the tar")
            start = frame.offset_data + padded_size(frame.size)
        return frames[0].offset, start - frames[0].offset
    named = next((suffix for suffix in members if PurePosixPath(suffix).suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES), None)
    if named is not None:
        raise BadVideoError(f"its video ends in {named}, expected one dot in the name, as in 000001.mp4")
    return None


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
    archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], place: tuple[int, int], key: str, source: str
) -> dict[str, Any]:
    labels = {}
    if ".cls" in members:
        label = _read(archive, members[".cls"]).strip()
        if not label.isdigit():
            raise BadVideoError(f"its .cls holds {label[:40]!r}, expected the number of its class")
        labels["class"] = int(label)
    with open(str(archive.name), "rb") as file:
        file.seek(place[0])
        data = file.read(place[1])
    return describe(key, sha256_of(data), probe(data), labels=labels, split="train", source=source)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, f"{member.name} is no file"
    return file.read()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the path, then renames, so that no half of a file is ever read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)
