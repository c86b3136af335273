"""Who may write to a target cache. Locks end with their process, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writer(root: Path, *, alone: bool) -> Iterator[None]:
    """A block that writes to a cache: beside other writers of segments, or ``alone``. Raises ValueError where
    others are in the way."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{root}: another command writes this cache: wait for it, or give another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """A block that waits until no other process is in its own: in which the manifest is read and replaced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
