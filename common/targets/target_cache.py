"""A whole target cache to read from: the clips that its files hold, found by their digests."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salt_distill.common.targets.codec import EncodedTarget
from salt_distill.common.targets.store import REPAIR, CacheFile, CacheRow, CacheSpec, read_manifest


class TargetCache:
    """A whole cache: ``find`` gives the row of a clip."""

    def __init__(self, root: str | Path) -> None:
        """Raises ValueError where the cache has no manifest, or a file of it is missing, damaged or another
        than the manifest lists."""
        self._root = Path(root)
        self._files: dict[str, CacheFile] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._digests)

    def refresh(self) -> None:
        """Takes up the files that were added since."""
        self._load(read_manifest(self._root))

    def find(self, clip_digest: bytes) -> CacheRow | None:
        """The row of a clip, or None. Its checksum is not checked: ``codec.decode_into`` does."""
        return next(self.rows(clip_digest), None)

    def rows(self, clip_digest: bytes) -> Iterator[CacheRow]:
        """Every row of a clip: more than one where a damaged one was computed again, or two writers met the
        same clip."""
        for numbers in self._numbers([clip_digest]):
            for number in numbers:
                file, row_number = self._place(number)
                yield file.row(row_number)

    def targets(self, clip_digests: Sequence[bytes]) -> Iterator[EncodedTarget | None]:
        """What ``find`` has of each clip but for sample and view, at less cost: most of the lookup is done
        for all clips at once."""
        for numbers in self._numbers(clip_digests):
            if not numbers:
                yield None
            else:
                file, row_number = self._place(numbers[0])
                yield file.encoded(row_number)

    def _numbers(self, clip_digests: Sequence[bytes]) -> Iterator[list[int]]:
        """The rows of each clip, counted over all files."""
        prefixes = np.frombuffer(b"".join(clip_digests), dtype="<u8").reshape(len(clip_digests), 4)[:, 0]
        first, end = (
            np.searchsorted(self._prefixes, prefixes, side=side).tolist() for side in ("left", "right")
        )
        for digest, begin, stop in zip(clip_digests, first, end, strict=True):
            yield [
                number
                for number in self._order[begin:stop].tolist()
                if self._digests[number].tobytes() == digest
            ]

    def _place(self, number: int) -> tuple[CacheFile, int]:
        """The file of a row, and the row in it."""
        file_idx = bisect_right(self._starts, number) - 1
        return self._opened[file_idx], number - self._starts[file_idx]

    def _load(self, manifest: dict[str, Any]) -> None:
        listed = manifest.pop("files")
        self.skipped: list[str] = manifest.pop("skipped")
        """Samples that have no targets, since they do not decode."""
        self.spec = CacheSpec.from_json(manifest)
        self._files = {
            name: self._files.get(name) or self._open(name, facts["rows"]) for name, facts in listed.items()
        }
        self._opened = list(self._files.values())
        self._starts: list[int] = np.cumsum([0] + [len(file) for file in self._opened]).tolist()
        digests = [file.digests() for file in self._opened]
        self._digests = np.concatenate(digests) if digests else np.zeros((0, 32), dtype=np.uint8)
        # 16 bytes a row, where a dictionary of digests takes ten times that; full digests are compared where
        # prefixes are equal
        prefixes = np.ascontiguousarray(self._digests[:, :8]).view("<u8").reshape(-1)
        self._order = np.argsort(prefixes, kind="stable")
        self._prefixes = prefixes[self._order]

    def _open(self, name: str, num_rows: int) -> CacheFile:
        path = self._root / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, expected {num_rows} targets: {REPAIR}")
        file = CacheFile(path, self.spec)
        if len(file) != num_rows:
            raise ValueError(f"{path}: got {len(file)} targets, expected {num_rows}: {REPAIR}")
        return file
