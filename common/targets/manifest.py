"""What a target cache says of itself: its manifest, and the names that its files may have (DESIGN section 4,
Target cache)."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, JsonValue, NonNegativeInt, ValidationError

from salt_distill.common.config import TargetDtype, explain
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.targets.codec import CorruptTargetError
from salt_distill.common.whole import PARTIAL, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
SEGMENTS = "segments"
"""Folder of the files that are written while targets are made, in the cache."""
REPAIR = "`salt-serve cache verify --repair` computes it again"
_CHECKSUM = "checksum"
"""Of a manifest: sha256 of all else in it, as canonical JSON."""
_FILE_NAME = re.compile(r"(?:segments/[0-9a-f]{8}-[0-9]+|[0-9a-f]{64}/view-[0-9]+/(?!\.)[^/\0]+)\.arrow")
_FOLDER_NAME = re.compile(r"segments|[0-9a-f]{64}")
_NOBODYS_FOLDERS = ("lost+found",)
"""What a new file system has in it."""


class CacheSpec(BaseModel):
    """What every target of a cache has in common; two caches with equal specs hold equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    teacher: TeacherSpec
    target_dtype: TargetDtype
    shape: tuple[int, int]
    """(n, d) of a target."""
    data_seed: int | None = None
    """This and what follows is None where clips came without it: targets that a service wrote through."""
    views: int | None = None
    """K: views per sample."""
    view: dict[str, JsonValue] | None = None
    """``view_facts``: the view configuration, and the version of the way from a draw to a clip."""
    decoder: str | None = None
    """Library and version that decoded the videos."""
    index_hash: str | None = None
    """Of the data set's index."""
    split: str | None = None

    @property
    def fingerprint(self) -> str:
        """The teacher's."""
        return self.teacher.fingerprint

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"format": FORMAT, "fingerprint": self.fingerprint, **self.model_dump(mode="json")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The spec in ``to_json``'s form. Raises ValueError for another format."""
        if values.get("format") != FORMAT:
            raise ValueError(f"got target cache format {values.get('format')!r}, expected {FORMAT}")
        try:
            return cls.model_validate(
                {name: value for name, value in values.items() if name not in ("format", "fingerprint")}
            )
        except ValidationError as error:
            raise ValueError(f"got no description of a target cache: {explain(error)}") from error

    def difference(self, expected: "CacheSpec") -> str | None:
        """The first thing in which this differs from what is expected, as part of a sentence; None where
        nothing does."""
        here, there = self.to_json(), expected.to_json()
        for name, value in there.items():
            if here[name] != value:
                return f"{name}={here[name]}, expected {value}"
        return None


class FileListing(BaseModel):
    """What a manifest says of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rows: NonNegativeInt
    """Targets in it."""
    sha256: str
    """Of its bytes, hexadecimal."""

    @classmethod
    def of(cls, path: Path, num_rows: int) -> Self:
        """That of a file with ``num_rows`` targets."""
        with path.open("rb") as file:
            return cls(rows=num_rows, sha256=hashlib.file_digest(file, "sha256").hexdigest())

    def difference(self, expected: "FileListing") -> str:
        """How a file is not what is expected of it."""
        return (
            f"got {self.rows} rows with sha256 {self.sha256}, expected {expected.rows} with {expected.sha256}"
        )


class Manifest(BaseModel):
    """All of a cache: what its targets have in common, and its files by their names in its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    spec: CacheSpec
    files: dict[str, FileListing]
    skipped: tuple[str, ...] = ()
    """Samples that have no targets, since they do not decode, sorted."""

    def write(self, folder: Path) -> None:
        """Puts it in place of the one that is there, whole: it is the last file of a cache that is
        written."""
        values = {
            **self.spec.to_json(),
            "files": {name: listing.model_dump() for name, listing in self.files.items()},
            "skipped": sorted(self.skipped),
        }
        text = json.dumps({**values, _CHECKSUM: _checksum(values)}, indent=2, sort_keys=True)
        write_whole(folder / MANIFEST, text, synced=True)

    @classmethod
    def read(cls, folder: Path, place: str | None = None) -> Self:
        """That of a cache. Raises ValueError where there is none, CorruptTargetError where it is not as it
        was written.

        ``place``: where the cache is, if ``folder`` only has a copy of the manifest.
        """
        path, called = folder / MANIFEST, f"{place or folder}/{MANIFEST}"
        if not path.is_file():
            raise ValueError(
                f"got {place or folder}, expected a target cache with a {MANIFEST}: `salt-serve precompute`"
                " writes"
                " it last, so let it finish"
            )
        try:
            values = json.loads(path.read_bytes())
            checksum = values.pop(_CHECKSUM, None)
            if checksum != _checksum(values):
                raise TypeError("it is not what was written")
            files, skipped = values.pop("files"), values.pop("skipped")
            if foreign := [name for name in files if not is_file_name(name)]:
                raise TypeError(f"it lists {foreign[0]!r}, which is no name of a cache's file")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CorruptTargetError(
                f"{called} is damaged: {error}. `salt-serve cache verify --repair` restores it"
            ) from error
        return cls(spec=CacheSpec.from_json(values), files=files, skipped=skipped)


def is_file_name(name: str) -> bool:
    """Whether a cache gives this name, relative to its folder, to a file with targets."""
    return _FILE_NAME.fullmatch(name) is not None


def is_own_name(name: str) -> bool:
    """Whether a file of this name, relative to the folder, is one that a cache may have written: with
    targets, the manifest, or one of both that is not whole."""
    folder, _, last = name.rpartition("/")
    whole = f"{folder}/{last.removeprefix(PARTIAL)}".removeprefix("/")
    return whole == MANIFEST or is_file_name(whole)


def foreign_names(names: Iterable[str]) -> list[str]:
    """Of the names at the top of a folder, those that no cache has there. Hidden ones are the system's."""
    return sorted(
        name
        for name in names
        if not (_FOLDER_NAME.fullmatch(name) or is_own_name(name) or name.startswith("."))
        and name not in _NOBODYS_FOLDERS
    )


def require_own_folder(place: str, names: Iterable[str]) -> None:
    """Raises ValueError where a folder without a manifest has other things in it: what a cache's commands
    remove is the cache's.

    ``names``: those at the top of the folder.
    """
    if foreign := foreign_names(names):
        raise ValueError(
            f"got {place}, which has {foreign[0]} in it, expected an empty folder or one of a target cache:"
            " give a"
            " folder of its own"
        )


def _checksum(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
