"""Files and folders that appear whole or not at all, for who reads them while they are written."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
"""How the name of what is not whole yet begins."""


_NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a write, which does not know the name of its file."""


def require_place(path: Path) -> None:
    """Raises ValueError where nothing can be written at ``path``: asked before work that may take days, it
    leaves nothing."""
    place = folder = path.absolute()
    if place.exists() and not place.is_file() and not place.is_dir():
        raise ValueError(f"got {path}, which is neither a file nor a folder")
    while not folder.is_dir():
        if folder.is_symlink() and not folder.exists():
            target = os.readlink(folder)
            raise ValueError(f"got {path}, but {folder} is a link to {target}, which is not there")
        if folder.exists() and folder != place:
            raise ValueError(f"got {path}, but {folder} is a file, expected a folder")
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"got {path}, but nothing can be written in {folder}: {error.strerror}") from error


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """A block that writes at ``path``: errors of the disk, such as a full one, name it."""
    try:
        yield
    except OSError as error:
        if error.errno in _NAMELESS and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def _kept(partial: Path, path: Path) -> Iterator[None]:
    """A block that writes ``partial``, which is to become ``path``: where somebody removes it meanwhile, the
    error says so."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(partial):
            raise
        raise OSError(
            f"{path} was not written: {partial.name} beside it was removed meanwhile: let one command at a"
            " time write there, and keep its folder until it ends"
        ) from error


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
        with named_errors(path), _kept(partial, path):
            partial.touch(exist_ok=False)
            mode = _mode(partial)
            yield partial
            _set_mode(partial, mode)
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
    if partial.is_symlink() or partial.is_file():
        partial.unlink()  # that somebody put there
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with named_errors(path), _kept(partial, path):
            yield partial
            mode = _mode(partial) & 0o666
            for written in [*partial.rglob("*"), partial]:
                if written.is_file():
                    _set_mode(written, mode)
                _sync(written)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    with _kept(partial, path):
        partial.rename(path)
    _sync(path.parent)


def write_whole(path: Path, content: str | bytes, *, synced: bool = False) -> None:
    """Makes a file of a text or of bytes, in place of one of that name; its folder too."""
    with whole_file(path, synced=synced) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _set_mode(path: Path, mode: int) -> None:
    """As the umask has it: a library may write a file of its own, which is closed to the group, and rename
    it."""
    if _mode(path) != mode:
        path.chmod(mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
