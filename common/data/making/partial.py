"""A folder in the making beside the one that it becomes: locked, continued after a kill, swapped in when it
is whole."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A line of the journal: a shard that is on disk, and what was read for it."""

    shard: str
    """File name."""
    num_bytes: int
    """Of the file."""
    next: int
    """Position of the first source after it."""
    num_good: int
    """Samples up to its end."""
    stamp: str
    """State of the sources since the shard before it."""
    skipped: list[tuple[str, str]]
    """(path, reason) of the sources since the shard before it that cannot be used."""


class PartialFolder:
    """Where shards are written until all are there. A context manager: leaving it releases the lock and keeps
    what is finished."""

    def __init__(self, out: Path, plan: str, stamp: Callable[[int, int], str]) -> None:
        """``plan``: what decides the shards; a journal of another plan is not continued. ``stamp``: state of
        the sources [first, end).

        Raises ValueError where another process is writing the same folder.
        """
        self._out = out.resolve()
        self._plan = plan
        self._journal_path = self._out.with_name(f".partial-{self._out.name}.jsonl")
        self.folder = self._out.with_name(f".partial-{self._out.name}")
        """Holds the finished shards, and the one that is being written."""
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._journal = self._lock()
        self.finished: list[Finished] = []
        """What an earlier run left, checked, and what was added since."""
        self.num_discarded = 0
        """Shards of an earlier run that cannot be used: files or options are others now."""
        self._continue(stamp)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()

    def add(self, finished: Finished) -> None:
        """Notes a shard, once it is on disk."""
        self.finished.append(finished)
        self._append(asdict(finished))

    def swap_in(self) -> None:
        """Puts the folder in OUT's place, and ends."""
        replaced = self._out.with_name(f".replaced-{self._out.name}")
        if replaced.exists():
            shutil.rmtree(replaced)
        if self._out.exists():
            self._out.rename(replaced)
        self.folder.rename(self._out)
        if replaced.exists():
            shutil.rmtree(replaced)
        self._journal_path.unlink()

    def _lock(self) -> Any:
        while True:
            journal = open(self._journal_path, "a+b")  # noqa: SIM115  (open until the pack ends: it carries the lock)
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                journal.close()
                raise ValueError(
                    f"got OUT {self._out}, which another `salt-data pack` is writing, expected one at a time"
                ) from error
            try:
                if os.path.samestat(os.fstat(journal.fileno()), os.stat(self._journal_path)):
                    return journal
            except FileNotFoundError:
                pass  # the other pack ended between our opening and our locking, and took its journal away
            journal.close()

    def _continue(self, stamp: Callable[[int, int], str]) -> None:
        """Takes over what can be, and removes the rest from folder and journal."""
        self.folder.mkdir(exist_ok=True)
        self._journal.seek(0)
        first, *lines = self._journal.read().splitlines(keepends=True) or [b""]
        lines = [
            line for line in lines if line.endswith(b"\n")
        ]  # a kill may have come while the last was written
        if first == _line({"plan": self._plan}):
            for line in lines:
                values = json.loads(line)
                entry = Finished(
                    **values | {"skipped": [(path, reason) for path, reason in values["skipped"]]}
                )
                shard = self.folder / entry.shard
                whole = shard.exists() and shard.stat().st_size == entry.num_bytes
                if (
                    not whole
                    or stamp(self.finished[-1].next if self.finished else 0, entry.next) != entry.stamp
                ):
                    break
                self.finished.append(entry)
        self.num_discarded = len(lines) - len(self.finished)
        self._journal.truncate(sum(map(len, [first, *lines[: len(self.finished)]])) if self.finished else 0)
        if not self.finished:
            self._append({"plan": self._plan})
        shards = {entry.shard for entry in self.finished}
        for path in self.folder.iterdir():
            if path.name not in shards:
                path.unlink()

    def _append(self, entry: Mapping[str, object]) -> None:
        self._journal.write(_line(entry))
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
