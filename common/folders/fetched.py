"""What is read from an object store as a whole: a copy on this machine of a checkpoint or a target cache."""

import hashlib
import logging
import os
import posixpath
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

from salt_distill.common.folders.folder import Folder, is_address
from salt_distill.common.whole import whole_file

logger = logging.getLogger(__name__)

_AT_ONCE = 8
"""Files that are copied at a time."""


def fetched(address: str | Path, below: str = "", *, wanted: Callable[[str], bool] = lambda _: True) -> Path:
    """The folder or file of an address, or what is ``below`` it, on this machine; a path of this machine is
    that itself.

    Copies lie in $XDG_CACHE_HOME/salt (~/.cache/salt), for every process of the machine; a copy that was
    interrupted goes on. What changes in the store is another copy. ``wanted``: the names of files to copy.
    Raises ValueError where there is nothing.
    """
    if not is_address(address):
        return Path(address) / below
    store = Folder(address)
    files = {name: info for name, info in store.listing(below).items() if wanted(posixpath.basename(name))}
    if not files:
        raise ValueError(f"got {address}, expected a folder or a file of an object store: nothing is there")
    facts = [[store.path(name), info.size, info.mtime_ns] for name, info in sorted(files.items())]
    folder = copies() / hashlib.sha256(repr([store.place, facts]).encode()).hexdigest()[:16]
    copy = folder / posixpath.basename(store.path(below))
    folder.mkdir(parents=True, exist_ok=True)

    def copy_one(name: str) -> None:
        path = copy / posixpath.relpath(name, below) if name != below else copy
        if not path.is_file() or path.stat().st_size != files[name].size:
            with whole_file(path, synced=False) as partial:
                store.fetch(name, partial)

    # The other ranks of this machine wait for the one that copies.
    with filelock.UnixFileLock(folder / ".lock"), ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(copy_one, files))
    return copy


def copies() -> Path:
    """The folder for what is in an object store and is needed on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "salt"
