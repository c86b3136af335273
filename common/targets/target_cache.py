"""A whole target cache to read from: the clips that its files hold, found by their digests."""

import logging
import resource
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from salt_distill.common.targets.cache_file import CacheFile, CacheRow
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.targets.manifest import REPAIR, Manifest

logger = logging.getLogger(__name__)

_OTHER_FILES = 1000
"""Files and sockets that a process may have open beside those of a cache."""


@dataclass(frozen=True)
class _OpenFile:
    """A file of a cache, and the clip digest of each of its rows: uint8 [rows, 32]."""

    file: CacheFile
    digests: np.ndarray


@dataclass(frozen=True)
class _Index:
    """Where each clip is.

    16 bytes a row, where a dictionary of digests takes ten times that; full digests are compared where
    prefixes are equal.
    """

    files: list[CacheFile]
    starts: list[int]
    """The first row of each file, counted over all files."""
    digests: np.ndarray
    order: np.ndarray
    """The rows by their digests' first 8 bytes."""
    prefixes: np.ndarray
    """Those bytes, in this order."""

    def places(self, clip_digests: Sequence[bytes]) -> Iterator[list[tuple[CacheFile, int]]]:
        """The rows of each clip: their files, and their numbers in them."""
        prefixes = np.frombuffer(b"".join(clip_digests), dtype="<u8").reshape(len(clip_digests), 4)[:, 0]
        first, end = (
            np.searchsorted(self.prefixes, prefixes, side=side).tolist() for side in ("left", "right")
        )
        for digest, begin, stop in zip(clip_digests, first, end, strict=True):
            yield [
                self._place(number)
                for number in self.order[begin:stop].tolist()
                if self.digests[number].tobytes() == digest
            ]

    def _place(self, number: int) -> tuple[CacheFile, int]:
        file_idx = bisect_right(self.starts, number) - 1
        return self.files[file_idx], number - self.starts[file_idx]


class TargetCache:
    """A whole cache: ``find`` gives the row of a clip. One thread may ``load`` while another reads."""

    def __init__(self, root: str | Path, *, without_damaged: bool = False) -> None:
        """Raises ValueError where the cache has no manifest, or a file of it is missing, damaged or another
        than the manifest lists. ``without_damaged``: such files are named in the log and left out
        instead."""
        self._root, self._without_damaged = Path(root), without_damaged
        self._files: dict[str, _OpenFile] = {}
        self.damaged: dict[str, int] = {}
        """Files that were left out, and the targets that the manifest lists in them."""
        self.load(Manifest.read(self._root))

    def __len__(self) -> int:
        return len(self._index.digests)

    def find(self, clip_digest: bytes) -> CacheRow | None:
        """The row of a clip, or None. Its checksum is not checked: ``codec.decode_into`` does."""
        for places in self._index.places([clip_digest]):
            for file, row_number in places:
                return file.row(row_number)
        return None

    def undamaged(self, clip_digest: bytes) -> EncodedTarget | None:
        """The target of a clip, checked, or None. Raises CorruptTargetError where there are only damaged
        ones: more than one where a damaged one was computed again, or two writers met the same clip."""
        damage: CorruptTargetError | None = None
        for places in self._index.places([clip_digest]):
            for file, row_number in places:
                try:
                    return file.undamaged(row_number)
                except CorruptTargetError as error:
                    damage = CorruptTargetError(f"{self._root}, clip {clip_digest.hex()[:12]}: {error}")
        if damage is not None:
            raise damage
        return None

    def targets(self, clip_digests: Sequence[bytes]) -> Iterator[EncodedTarget | None]:
        """What ``find`` has of each clip but for sample and view, at less cost: most of the lookup is done
        for all clips at once."""
        for places in self._index.places(clip_digests):
            if not places:
                yield None
            else:
                file, row_number = places[0]
                yield file.encoded(row_number)

    def load(self, manifest: Manifest) -> None:
        """Takes up the files that a manifest lists now."""
        self.spec, self.skipped = manifest.spec, manifest.skipped
        _allow_open_files(len(manifest.files))
        files = dict[str, _OpenFile]()
        for name, listing in manifest.files.items():
            try:
                files[name] = self._files.get(name) or self._open(name, listing.rows)
            except ValueError as error:
                if not self._without_damaged:
                    raise
                if name not in self.damaged:
                    logger.error("a file of the target cache is left out: %s", error)
                self.damaged[name] = listing.rows
        starts: list[int] = np.cumsum([0] + [len(opened.file) for opened in files.values()]).tolist()
        digests = np.concatenate(
            [np.zeros((0, 32), dtype=np.uint8), *(opened.digests for opened in files.values())]
        )
        self._files = {
            name: _OpenFile(opened.file, digests[start : start + len(opened.file)])
            for (name, opened), start in zip(files.items(), starts, strict=False)
        }
        prefixes = np.ascontiguousarray(digests[:, :8]).view("<u8").reshape(-1)
        order = np.argsort(prefixes, kind="stable")
        self._index = _Index(
            files=[opened.file for opened in files.values()],
            starts=starts,
            digests=digests,
            order=order,
            prefixes=prefixes[order],
        )

    def _open(self, name: str, num_rows: int) -> "_OpenFile":
        path = self._root / name
        if not path.is_file():
            raise CorruptTargetError(f"{path} is missing, expected {num_rows} targets: {REPAIR}")
        file = CacheFile(path, self.spec)
        if len(file) != num_rows:
            raise CorruptTargetError(f"{path}: got {len(file)} targets, expected {num_rows}: {REPAIR}")
        return _OpenFile(file, file.digests())


def _allow_open_files(number: int) -> None:
    """Lets this process have so many files of a cache open beside its others, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
