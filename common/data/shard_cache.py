"""Encoded videos on a local disk, kept from one reading of a slow store to the next."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from salt_distill.common.data.sample import sha256_of
from salt_distill.common.whole import PARTIAL, whole_file

_PARENT, _NAME = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{62}")
"""What it calls its own, and may remove."""
_FILL = 0.9
"""Share of the cache that is kept when it is full: the listing of its files serves many videos."""


class ShardCache:
    """Videos under the hash of their content, never more than ``max_bytes`` of them; those that were not read
    for longest go first.

    Any number of processes, runs and data sets may share a folder. Videos appear whole or not at all. Thread
    safe.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = Path(folder), max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, sha256: str) -> bytes | None:
        """The video with this hash, if it is still there, whole and unchanged."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        if sha256_of(data) == sha256:
            return data
        path.unlink(missing_ok=True)  # a disk erred
        return None

    def put(self, sha256: str, data: bytes) -> None:
        """Keeps a video, unless the whole cache is too small for it."""
        if len(data) > self._max_bytes:
            return
        path = self._path(sha256)
        path.parent.mkdir(exist_ok=True)
        with self._locked() as total:
            if path.exists():
                return
            before = total.read()
            if before + len(data) > self._max_bytes:
                before = self._evict(len(data))
            with whole_file(path, synced=False) as partial:
                partial.write_bytes(data)
                # Counted before it has its name: who is killed between the two leaves a cache that is counted
                # as too large, which the next eviction puts right.
                total.write(before + len(data))

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256[2:]

    def _evict(self, room: int) -> int:
        """Makes room; the bytes of what is left. Under the lock, so a partial file is one that a killed
        process left."""
        videos: list[tuple[float, int, str]] = []
        for parent in os.scandir(self._folder):
            for entry in os.scandir(parent) if _PARENT.fullmatch(parent.name) else ():
                if entry.name.startswith(PARTIAL):
                    os.remove(entry)
                elif _NAME.fullmatch(entry.name):
                    status = entry.stat()
                    videos.append((status.st_mtime, status.st_size, entry.path))
        num_bytes = sum(size for _, size, _ in videos)
        for _, size, path in sorted(videos):
            if num_bytes + room <= max(_FILL * self._max_bytes, room):
                break
            os.remove(path)
            num_bytes -= size
        return num_bytes

    @contextlib.contextmanager
    def _locked(self) -> Iterator["_Total"]:
        descriptor = os.open(self._folder / "total", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Total(descriptor)
        finally:
            os.close(descriptor)


class _Total:
    """The bytes in the cache, in a file that is locked."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> int:
        return int(os.pread(self._descriptor, 20, 0) or b"0")

    def write(self, num_bytes: int) -> None:
        os.pwrite(self._descriptor, b"%20d" % num_bytes, 0)
