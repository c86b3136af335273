"""The folder of a target cache, on this machine or in an object store: in a store files come to this machine
one at a time, and go back whole."""

import contextlib
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from salt_distill.common.folders.fetched import copies
from salt_distill.common.folders.folder import Folder
from salt_distill.common.targets.locks import held, one_at_a_time, writer
from salt_distill.common.targets.manifest import MANIFEST, Manifest, require_own_folder


class CacheFolder:
    """A target cache by its address. Raises ConnectionError where a store fails for longer than it is asked
    again."""

    def __init__(self, address: str) -> None:
        self._folder = Folder(address)
        self.place = self._folder.place
        """The address as it may be shown."""
        self.local = self._folder.local
        """The folder, where it is one of this machine."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its name in the cache."""
        with self._reached("its files could not be listed"):
            return {name: info.size for name, info in sorted(self._folder.listing().items()) if name}

    @contextlib.contextmanager
    def at_hand(self, name: str) -> Iterator[Path]:
        """Where a file is on this machine, if there is one, or is to be made, for the block; ``put`` makes it
        that of the cache."""
        if self.local is not None:
            yield self.local / name
            return
        with _workplace() as place:
            path = place / posixpath.basename(name)
            with self._reached(f"{name} could not be read"), contextlib.suppress(FileNotFoundError):
                self._folder.fetch(name, path)
            yield path

    def put(self, name: str, path: Path) -> None:
        """Takes a whole file that was made ``at_hand``, in place of one of that name."""
        if self.local is None:
            with self._reached(f"{name} could not be written"):
                self._folder.write(name, path)

    def manifest(self) -> Manifest:
        """See ``Manifest.read``."""
        with self.at_hand(MANIFEST) as path:
            return Manifest.read(path.parent, self.place)

    def require_own(self) -> None:
        """Raises ValueError where there is no cache yet, but something else."""
        sizes = self.sizes()
        if MANIFEST not in sizes:
            require_own_folder(self.place, {name.partition("/")[0] for name in sizes})

    def free_bytes(self) -> int:
        """Of the disk that files are made on."""
        folder = self.local or copies()
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """A block in which no other command writes here. Raises ValueError where one does. A store knows no
        locks, so there it is the user's part."""
        return contextlib.nullcontext() if self.local is None else writer(self.local, alone=True)

    @contextlib.contextmanager
    def _reached(self, failure: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if self.local is not None:
                raise
            raise ConnectionError(
                f"{self.place}: {failure}: {error}. The files that are there are whole: put that right, and"
                " repeat the command"
            ) from error


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """An empty folder on this machine, as long as the block; those that killed processes have left are
    removed."""
    parent = copies() / "making"
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as holding:
        with one_at_a_time(parent):
            for other in parent.iterdir():
                with held(other) as is_left:
                    if is_left:
                        shutil.rmtree(other)
            folder = Path(tempfile.mkdtemp(dir=parent))
            holding.enter_context(held(folder))
        try:
            yield folder
        finally:
            with one_at_a_time(parent):
                shutil.rmtree(folder)
