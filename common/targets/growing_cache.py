"""A target cache that grows while targets are made: segments, each sealed at a size (DESIGN section 4, Target
cache)."""

import contextlib
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path

from salt_distill.common.targets.cache_file import CacheFile, CacheRow, write_rows
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.targets.locks import held, one_at_a_time, writer
from salt_distill.common.targets.manifest import (
    MANIFEST,
    SEGMENTS,
    CacheSpec,
    FileListing,
    Manifest,
    is_file_name,
    is_own_name,
    require_own_folder,
)
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.common.whole import PARTIAL, whole_file

logger = logging.getLogger(__name__)


class GrowingCache:
    """What one writer adds to a cache folder, and what it finds there, by whomever. Several writers may share
    the folder.

    One thread may ``find`` while another writes. A target is in the folder once its segment is sealed; a kill
    loses the one segment that is not, and its targets are computed again. So are those of a damaged file, and
    a damaged manifest is made again from the segments that are whole.
    """

    def __init__(self, root: Path, spec: CacheSpec, *, segment_bytes: int) -> None:
        """Raises ValueError where the folder holds targets of another teacher, dtype or kind, or what is no
        cache's."""
        self._root, self._spec, self._segment_bytes = root, spec, segment_bytes
        self._name, self._number = secrets.token_hex(4), 0
        self._open: dict[bytes, EncodedTarget] = {}
        self._being_sealed: dict[bytes, EncodedTarget] = {}
        self._open_bytes = 0
        self._writing = contextlib.ExitStack()
        require_place(root)
        self._writing.enter_context(writer(root, alone=False))
        try:
            (root / SEGMENTS).mkdir(exist_ok=True)
            with one_at_a_time(root / SEGMENTS):
                self._remove_partial_files()
                if not (root / MANIFEST).exists():
                    Manifest(spec=spec, files={}).write(root)
                manifest = self._manifest()
                if (difference := manifest.spec.difference(spec)) is not None:
                    raise ValueError(
                        f"{root / MANIFEST}: got a cache with {difference}: give an empty folder"
                    )
                self._sealed = TargetCache(root, without_damaged=True)
        except BaseException:
            self._writing.close()
            raise

    def __len__(self) -> int:
        return len(self._sealed) + len(self._open)

    @property
    def num_open(self) -> int:
        """Targets that are not sealed yet."""
        return len(self._open)

    @property
    def num_left_out(self) -> int:
        """Targets in files that are damaged, and are computed again."""
        return sum(self._sealed.damaged.values())

    def find(self, clip_digest: bytes) -> EncodedTarget | None:
        """The undamaged target of a clip, or None. Raises CorruptTargetError where there are only damaged
        ones: compute it again."""
        return (
            self._open.get(clip_digest)
            or self._being_sealed.get(clip_digest)
            or self._sealed.undamaged(clip_digest)
        )

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
        if not self._open:
            return
        self._being_sealed = self._open  # first, so that no target is missing between the two lines
        self._open, self._open_bytes = {}, 0
        try:
            self._write(self._being_sealed)
        finally:
            self._being_sealed = {}

    def _write(self, opened: Mapping[bytes, EncodedTarget]) -> None:
        segments = self._root / SEGMENTS
        with one_at_a_time(segments):
            self._sealed.load(self._manifest())
        # others may have met them too
        missing = {digest: encoded for digest, encoded in opened.items() if not self._is_sealed(digest)}
        if not missing:
            return
        name = f"{SEGMENTS}/{self._name}-{self._number}.arrow"
        self._number += 1
        rows = (
            CacheRow(clip_digest=digest, key=None, view=None, encoded=encoded)
            for digest, encoded in missing.items()
        )
        with contextlib.ExitStack() as owning, contextlib.ExitStack() as writing:
            with one_at_a_time(segments):  # so that whoever removes partial files finds this one owned
                partial = writing.enter_context(whole_file(self._root / name))
                owning.enter_context(held(partial))
            num_rows = write_rows(partial, self._spec, rows)
        listing = FileListing.of(self._root / name, num_rows)
        with one_at_a_time(segments):
            manifest = self._manifest()
            manifest = manifest.model_copy(update={"files": {**manifest.files, name: listing}})
            manifest.write(self._root)
            self._sealed.load(manifest)

    def _is_sealed(self, clip_digest: bytes) -> bool:
        try:
            return self._sealed.undamaged(clip_digest) is not None
        except CorruptTargetError:
            return False  # it is here to be written again

    def close(self) -> None:
        """Seals what was added."""
        try:
            self.seal()
        finally:
            self._writing.close()

    def _manifest(self) -> Manifest:
        """That of the folder; a damaged one is made again first. Raises OSError where the folder is not there
        any more: a disk that was unmounted is not written beside."""
        if not (self._root / MANIFEST).exists():
            raise FileNotFoundError(f"{self._root / MANIFEST} was removed: start again with an empty folder")
        try:
            return Manifest.read(self._root)
        except CorruptTargetError as error:
            if any(self._root.glob("*/view-*")):
                raise  # no service has made it, so others decide
            manifest = Manifest(spec=self._spec, files=self._whole_segments())
            manifest.write(self._root)
            logger.error("%s; it was made again from %d whole segments", error, len(manifest.files))
            return manifest

    def _whole_segments(self) -> dict[str, FileListing]:
        """Raises ValueError where one is of another teacher, dtype or kind."""
        listings = dict[str, FileListing]()
        for path in sorted((self._root / SEGMENTS).glob("*.arrow")):
            name = f"{SEGMENTS}/{path.name}"
            if is_file_name(name):
                with contextlib.suppress(CorruptTargetError):
                    file = CacheFile(path, self._spec)
                    file.digests()
                    listings[name] = FileListing.of(path, len(file))
        return listings

    def _remove_partial_files(self) -> None:
        """What writers that were killed have left: files that nobody holds. While ``one_at_a_time``, and so
        is the manifest written."""
        for path in (
            *self._root.glob(f"{PARTIAL}{MANIFEST}"),
            *self._root.glob(f"{SEGMENTS}/{PARTIAL}*.arrow"),
        ):
            if not is_own_name(path.relative_to(self._root).as_posix()):
                continue
            if path.is_symlink():
                path.unlink()
                continue
            with contextlib.suppress(FileNotFoundError), held(path) as is_left:  # it may be whole by now
                if is_left:
                    path.unlink()


def require_place(root: Path) -> None:
    """Raises ValueError where ``root`` is there and no cache could grow in it."""
    if (root / MANIFEST).exists() or not root.is_dir():
        return
    if any(root.glob("*/view-*")):
        raise ValueError(
            f"got {root}, where `salt-serve precompute` has not finished: repeat that command, or give"
            " another folder"
        )
    require_own_folder(str(root), (path.name for path in root.iterdir()))
