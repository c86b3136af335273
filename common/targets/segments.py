"""A target cache that grows while targets are made: segments, each sealed at a size (DESIGN section 4, Target
cache)."""

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path

from salt_distill.common.targets import codec, store
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.targets.locks import one_at_a_time, writer
from salt_distill.common.targets.store import CacheRow, CacheSpec
from salt_distill.common.targets.target_cache import TargetCache

SEGMENTS = "segments"
"""Their folder in the cache."""


class SegmentStore:
    """What one writer adds to a cache folder, and what it finds there, by whomever. Several writers may share
    the folder.

    One thread at a time: it reads and writes files. A target is in the folder once its segment is sealed; a
    kill loses the one segment that is not, and its targets are computed again.
    """

    def __init__(self, root: Path, spec: CacheSpec, *, segment_bytes: int) -> None:
        """Raises ValueError where the folder holds targets of another teacher, dtype or kind."""
        self._root, self._spec, self._segment_bytes = root, spec, segment_bytes
        self._name, self._number = secrets.token_hex(4), 0
        self._open: dict[bytes, EncodedTarget] = {}
        self._open_bytes = 0
        self._writing = contextlib.ExitStack()
        self._writing.enter_context(writer(root, alone=False))
        (root / SEGMENTS).mkdir(exist_ok=True)
        with one_at_a_time(root / SEGMENTS):
            path = root / store.MANIFEST
            if not path.exists():
                store.write_manifest(root, spec, {}, skipped=[])
            found = store.read_manifest(root)
            for name, value in spec.to_json().items():
                if found.get(name) != value:
                    raise ValueError(
                        f"{path}: got a cache with {name}={found.get(name)}, expected {value}: give an empty"
                        " folder"
                    )
            self._sealed = TargetCache(root)

    def __len__(self) -> int:
        return len(self._sealed) + len(self._open)

    @property
    def num_open(self) -> int:
        """Targets that are not sealed yet."""
        return len(self._open)

    def find(self, clip_digest: bytes) -> EncodedTarget | None:
        """The undamaged target of a clip, or None. Raises CorruptTargetError where there are only damaged
        ones: compute it again."""
        return self._open.get(clip_digest) or self._find_sealed(clip_digest)

    def _find_sealed(self, clip_digest: bytes) -> EncodedTarget | None:
        damage: CorruptTargetError | None = None
        for row in self._sealed.rows(clip_digest):
            try:
                codec.verify(
                    row.encoded,
                    self._spec.target_dtype,
                    num_tokens=self._spec.shape[0],
                    width=self._spec.shape[1],
                )
                return row.encoded
            except CorruptTargetError as error:
                damage = CorruptTargetError(f"{self._root}, clip {clip_digest.hex()[:12]}: {error}")
        if damage is not None:
            raise damage
        return None

    def add(self, targets: Mapping[bytes, EncodedTarget]) -> None:
        """Keeps targets by their clips' digests; seals the segment where it has its size."""
        for clip_digest, encoded in targets.items():
            if clip_digest not in self._open:
                self._open[clip_digest] = encoded
                self._open_bytes += encoded.num_bytes
        if self._open_bytes >= self._segment_bytes:
            self.seal()

    def seal(self) -> None:
        """Writes what was added since the last segment, and takes up what others have written. OSError costs
        this segment."""
        opened, self._open, self._open_bytes = self._open, {}, 0
        if opened:
            self._sealed.refresh()
        rows = {
            digest: encoded for digest, encoded in opened.items() if not self._is_sealed(digest)
        }  # others may have met them too
        if not rows:
            return
        name = f"{SEGMENTS}/{self._name}-{self._number}.arrow"
        self._number += 1
        cache_rows = (
            CacheRow(clip_digest=digest, key=None, view=None, encoded=encoded)
            for digest, encoded in rows.items()
        )
        num_rows = store.write_file(self._root / name, self._spec, cache_rows)
        listing = store.listing(self._root / name, num_rows)
        with one_at_a_time(self._root / SEGMENTS):
            manifest = store.read_manifest(self._root)
            manifest["files"][name] = listing
            store.replace_manifest(self._root, manifest)
            self._sealed.refresh()

    def _is_sealed(self, clip_digest: bytes) -> bool:
        try:
            return self._find_sealed(clip_digest) is not None
        except CorruptTargetError:
            return False  # it is here to be written again

    def close(self) -> None:
        """Seals what was added."""
        try:
            self.seal()
        finally:
            self._writing.close()
