"""A run's copy at another address: checkpoints go there beside the training, and come back where the run
directory has none so new."""

import logging
import shutil
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from salt_distill.common.folders.folder import Folder
from salt_distill.common.model.checkpoint import POINTER, CheckpointManifest, point_to, verified
from salt_distill.common.whole import PARTIAL, whole_folder

logger = logging.getLogger(__name__)

_EXPLAIN = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json")
"""Files beside the checkpoints that travel with them."""


class UploadError(ConnectionError):
    """A checkpoint could not be copied to the storage."""


class Uploads:
    """Copies what ``run`` has to ``address`` in a thread of its own; None: copies nothing."""

    def __init__(self, run: Path, address: str | None) -> None:
        self._run = run
        self._folder = None if address is None else Folder(address)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._newest: Future[None] = _done()
        self._copies: list[tuple[Path, Future[None]]] = []
        """Of checkpoints, those that are not done."""

    def add(self, checkpoint: Path) -> None:
        """Copies a whole checkpoint soon. One that still waits for its turn is left out: this one is
        newer."""
        if self._folder is not None and (self._newest.cancel() or not self._failed()):
            self._newest = self._thread.submit(self._copy, self._folder, checkpoint)
            self._copies = [*self._pending(), (checkpoint, self._newest)]

    def under_way(self) -> set[Path]:
        """The checkpoints that are being copied, or soon will be."""
        return {checkpoint for checkpoint, _ in self._pending()}

    def _pending(self) -> list[tuple[Path, Future[None]]]:
        return [(checkpoint, copy) for checkpoint, copy in self._copies if not copy.done()]

    def failure(self) -> Future[None]:
        """Done at once, with the error of a copy that failed."""
        return self._newest if self._failed() else _done()

    def finish(self) -> Future[None]:
        """Done when everything is copied, the summary too; or with what stopped it."""
        if self._folder is None or self._failed():
            return self._newest
        return self._thread.submit(self._copy_rest, self._folder, self._newest)

    def _failed(self) -> bool:
        return self._newest.done() and not self._newest.cancelled() and self._newest.exception() is not None

    def _copy(self, folder: Folder, checkpoint: Path) -> None:
        name = checkpoint.relative_to(self._run).as_posix()
        try:
            if _pointer(folder) == name:
                return
            for file in [
                *sorted(
                    CheckpointManifest.model_validate_json((checkpoint / "manifest.json").read_bytes()).files
                ),
                "manifest.json",
            ]:
                folder.write(f"{name}/{file}", checkpoint / file)
            self._explain(folder)
            folder.write(POINTER, f"{name}\n".encode())  # last: what it names is whole
        except OSError as error:
            raise UploadError(
                f"{name} could not be copied to {folder.address}: {error}. It is whole in {self._run}: repeat"
                " the command with --resume when the storage is back, or without --storage"
            ) from error

    def _copy_rest(self, folder: Folder, newest: Future[None]) -> None:
        newest.result()
        try:
            self._explain(folder)
        except OSError as error:
            raise UploadError(
                f"the metrics of {self._run} could not be copied to {folder.address}: {error}"
            ) from error

    def _explain(self, folder: Folder) -> None:
        for file in _EXPLAIN:
            if (self._run / file).exists():
                folder.write(file, self._run / file)


def remove_old(run: Path, num_newest: int | None, *, overtaken: Container[Path], but: set[Path]) -> None:
    """Removes the checkpoints of a run that are older than its ``num_newest``, but for ``but`` and the one
    that the run goes on from; None: only those ``overtaken``."""
    needed = {*but, run / (run / POINTER).read_text().strip()}
    folder = run / "checkpoints"
    in_order = sorted(folder.glob("step-*"), key=lambda path: _step(path.name))
    old = [path for path in in_order if path in overtaken] if num_newest is None else in_order[:-num_newest]
    for path in old:
        if path not in needed:
            path.rename(path.with_name(PARTIAL + path.name))  # at once: a kill leaves no half a checkpoint
    for path in folder.glob(f"{PARTIAL}step-*"):
        shutil.rmtree(path)


def stored_config(address: str) -> bytes | None:
    """``config.yaml`` of the run at an address, None where there is none."""
    try:
        return Folder(address).read("config.yaml")
    except FileNotFoundError:
        return None


def fetch_newer(address: str, run: Path) -> None:
    """Brings the newest checkpoint, with metrics, from an address into ``run``, if it is newer than the
    newest there. Raises ValueError where it is damaged."""
    folder = Folder(address)
    name, pointer = _pointer(folder), run / POINTER
    if name is None or (pointer.exists() and _step(pointer.read_text().strip()) >= _step(name)):
        return
    logger.warning("%s: fetching %s from %s", run, name, address)
    manifest = folder.read(f"{name}/manifest.json")
    with whole_folder(run / name) as partial:  # in place of one that a kill left before anything named it
        (partial / "manifest.json").write_bytes(manifest)
        for file in CheckpointManifest.model_validate_json(manifest).files:
            folder.fetch(f"{name}/{file}", partial / file)
            try:
                verified(partial, file)
            except ValueError as error:
                raise ValueError(f"{address}: {name} is damaged, remove it there: {error}") from error
        for file in _EXPLAIN[1:]:  # the configuration is that of the command that goes on
            try:
                folder.fetch(file, run / file)
            except FileNotFoundError:
                continue  # a run that was killed has no summary
    point_to(run, run / name)


def _pointer(folder: Folder) -> str | None:
    """The newest checkpoint at an address."""
    try:
        return folder.read(POINTER).decode().strip()
    except FileNotFoundError:
        return None


def _step(name: str) -> int:
    return int(name.rpartition("step-")[2])


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
