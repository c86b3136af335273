"""Who may write to a target cache. Locks end with their process, however it ends.

Our own, since a cache is shared by several writers or owned by one, and filelock has no lock that both can
hold; and since a folder is locked itself, so that nothing but targets is in it.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FIRST_S = 2.0
"""How long a writer that is the first may be alone before others join it."""


@contextmanager
def writer(root: Path, *, alone: bool) -> Iterator[None]:
    """A block that writes to a cache: beside other writers of segments, or ``alone``. Raises ValueError where
    others are in the way."""
    root.mkdir(parents=True, exist_ok=True)
    with _open(root) as descriptor:
        if _taken(descriptor, fcntl.LOCK_EX):
            if not alone:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        elif alone or not _taken(descriptor, fcntl.LOCK_SH, patience_s=_FIRST_S):
            raise ValueError(
                f"{root}: another command writes this cache: wait for it, or give another folder"
            )
        yield


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """A block that waits until no other process is in its own: in which the manifest is read and replaced."""
    with _open(folder) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """A block for which a folder or a file is this process's; False where it is another's."""
    with _open(path) as descriptor:
        yield _taken(descriptor, fcntl.LOCK_EX)


@contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(descriptor: int, kind: int, patience_s: float = 0.0) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        time.sleep(0.02)
