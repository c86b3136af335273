"""Files in a folder of this machine or in an object store: those of a data set, and copies of a run."""

import functools
import io
import logging
import posixpath
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import pyarrow as pa
import pyarrow.fs as fs
import tenacity

from salt_distill.common.clip import BadVideoError
from salt_distill.common.folders.slice import Slice, require_whole
from salt_distill.common.whole import whole_file

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_BUDGET_S = 120.0
"""How long a request to an object store is tried again before it is an error, in seconds."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_ANSWERS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_REFUSALS = ("ACCESS_DENIED", "NO_SUCH_BUCKET")
"""In an error of an object store: that is its answer, however often it is asked."""
_COPY_BYTES = 8_000_000
"""Of a file that is copied, in memory at a time."""
_MAX_OPEN = 128
"""Tars of an object store that are known by size; a run reads from few at a time."""
_OWN_SCHEMES = frozenset(["file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "hf"])
"""What pyarrow reads itself."""


class Folder:
    """A folder by its address: a path, or a URL of pyarrow's file systems (s3, gs, abfs, hf; others through
    fsspec). Thread safe.

    Requests to an object store are tried again where it fails, with backoff, jitter and a budget; they are
    counted, and raise OSError in the end.
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        self.place = self.address.partition("?")[0]
        """The address without options of the file system, which may hold credentials."""
        self.num_retries = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._files, self._base = self._retrying(lambda: _file_system(self.address))
        self.local = Path(self._base) if isinstance(self._files, fs.LocalFileSystem) else None
        """The folder, where it is one of this machine."""
        self._open = functools.lru_cache(maxsize=_MAX_OPEN)(
            self._files.open_input_file
        )  # a store is asked for the size of a file once

    def path(self, name: str) -> str:
        """Of a file, in its file system; a name may lead out of the folder, as those of a mixture do."""
        return posixpath.normpath(posixpath.join(self._base, name))

    def read(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""
        return self._retrying(lambda: self._files.open_input_file(self.path(name)).read())

    def write(self, name: str, content: Path | bytes) -> None:
        """Makes a file of a local file's content, or of bytes; in place of one of that name."""
        path = self.path(name)

        def attempt() -> None:
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source:
                if self.local is None:
                    with self._files.open_output_stream(path) as target:
                        shutil.copyfileobj(source, target, _COPY_BYTES)
                    return
                with whole_file(Path(path), synced=False) as partial, partial.open("wb") as target:
                    shutil.copyfileobj(source, target, _COPY_BYTES)

        self._retrying(attempt)

    def fetch(self, name: str, to: Path) -> None:
        """Copies a file to a local one, of any size. Raises FileNotFoundError."""

        def attempt() -> None:
            with (
                self._files.open_input_stream(self.path(name), compression=None) as source,
                to.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, _COPY_BYTES)

        self._retrying(attempt)

    def slice(self, name: str, offset: int, size: int) -> Slice | bytes:
        """A part of a file: of this machine where it is, else the bytes. Raises BadVideoError where they are
        not there."""
        path = self.path(name)
        if self.local is not None:
            return Slice(path, offset, size)

        def read() -> bytes:
            if isinstance(
                self._files, fs.PyFileSystem
            ):  # fsspec, whose open files read ahead and are for one thread
                return self._files.handler.fs.cat_file(path, start=offset, end=offset + size)
            file = self._open(path)
            num_bytes = file.size() - offset
            return file.read_at(min(size, num_bytes), offset) if num_bytes > 0 else b""

        try:
            data = self._retrying(read)
        except FileNotFoundError as error:
            raise BadVideoError(f"{path} is not there") from error
        require_whole(data, size, path)
        return data

    def missing(self, names: list[str]) -> list[str]:
        """Those files that are not there."""
        folders: dict[str, set[str]] = {}
        for name in names:
            folder = posixpath.dirname(self.path(name))
            if folder not in folders:
                selector = fs.FileSelector(folder, allow_not_found=True)
                folders[folder] = {
                    info.base_name for info in self._retrying(lambda s=selector: self._files.get_file_info(s))
                }
        return [
            name
            for name in names
            if posixpath.basename(name) not in folders[posixpath.dirname(self.path(name))]
        ]

    def listing(self, below: str = "") -> dict[str, fs.FileInfo]:
        """The files in it, or in a folder of it, by name; where the address is a file itself, that one under
        no name."""
        path = self.path(below)
        itself = self._retrying(lambda: self._files.get_file_info(path))
        if itself.is_file:
            return {below: itself}
        selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
        infos = self._retrying(lambda: self._files.get_file_info(selector))
        return {posixpath.relpath(info.path, self._base): info for info in infos if info.is_file}

    def close(self) -> None:
        """Ends the waits for another try, in every thread."""
        self._closed.set()

    def _retrying(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns. A disk of this machine, or a store that refuses, is not asked again."""
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._may_pass),
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
            stop=tenacity.stop_before_delay(RETRY_BUDGET_S) | tenacity.stop_when_event_set(self._closed),
            sleep=tenacity.sleep_using_event(self._closed),
            before_sleep=self._note_retry,
            retry_error_callback=self._give_up,
        )(attempt)

    def _may_pass(self, error: BaseException) -> bool:
        if not isinstance(error, OSError) or isinstance(error, _ANSWERS) or not is_address(self.address):
            return False
        return not any(refusal in str(error) for refusal in _REFUSALS)

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        with self._lock:
            self.num_retries += 1
        error = state.outcome.exception() if state.outcome else None
        logger.warning("%s: %s; trying again in %.1f s", self.address, error, state.upcoming_sleep)

    def _give_up(self, state: tenacity.RetryCallState) -> NoReturn:
        error = state.outcome.exception() if state.outcome else None
        raise OSError(
            f"{self.address} failed for {state.seconds_since_start or 0:.1f} s, and the budget is"
            f" {RETRY_BUDGET_S:g} s: {error}"
        ) from error


def is_address(path: str | Path) -> bool:
    """Whether it is an address in an object store, not a path of this machine."""
    return "://" in str(path)


def _file_system(address: str) -> tuple[fs.FileSystem, str]:
    """The file system of an address, and the path in it."""
    scheme, separator, _ = address.partition("://")
    if not separator:
        return fs.LocalFileSystem(), str(
            Path(address).resolve()
        )  # a mixture's names start from where it is, not from a link to it
    known = scheme in _OWN_SCHEMES or scheme.startswith("fsspec+")
    try:
        return fs.FileSystem.from_uri(address if known else f"fsspec+{address}")
    except (pa.ArrowInvalid, ValueError, ImportError) as error:
        raise ValueError(
            f"got {address}, expected a path or a URL such as s3://BUCKET/FOLDER: {error}"
        ) from error
