"""Files and folders that appear whole or not at all, for who reads them while they are written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
"""How the name of what is not whole yet begins."""


@contextmanager
def whole_file(path: Path, *, synced: bool = True, many_writers: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end of the block it takes the place of ``path``, and after
    an error it is gone.

    ``synced``: the file then outlives a power cut. ``many_writers``: several processes may write this file
    at once, so each has a partial file of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{f'{os.getpid()}-' if many_writers else ''}{path.name}")
    partial.unlink(missing_ok=True)  # one that a kill has left, or a link that somebody put there
    try:
        yield partial
        if synced:
            _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if synced:
        _sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to write to; at the end of the block it is on disk, power cut or not,
    and takes the place of ``path``; after an error it is gone."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for written in [*partial.rglob("*"), partial]:
        _sync(written)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    _sync(path.parent)


def write_whole(path: Path, content: str | bytes, *, synced: bool = False) -> None:
    """Makes a file of a text or of bytes, in place of one of that name; its folder too."""
    with whole_file(path, synced=synced) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
