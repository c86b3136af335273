"""What a command that fails before it has done anything leaves: nothing."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def left_as_it_was(path: Path, *, unless: Callable[[], bool]) -> Iterator[None]:
    """A block that begins to write at ``path``, a file or a folder. Where the block ends with an error, what
    it made there, and above it, is removed; ``unless`` there is something by then that somebody may go on
    from."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    before = set(path.iterdir()) if path.is_dir() else set[Path]()
    try:
        yield
    except BaseException:
        if not unless():
            for made in set(path.iterdir()) - before if path.is_dir() else ():
                shutil.rmtree(made) if made.is_dir() and not made.is_symlink() else made.unlink()
            _remove_empty(missing)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders that hold nothing, the deepest first."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
