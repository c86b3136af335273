"""The board on disk: JSON lines, the first of which names the teacher. Lines are appended, and all of it is
written anew where it has grown."""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from salt_distill.common.metrics import ServiceMetrics
from salt_distill.common.whole import write_whole
from salt_distill.teacher_server.board.runs import RunLine

logger = logging.getLogger(__name__)

_FORMAT = "salt-board-1"
_LEAST_BYTES = 1_000_000
"""Below this size a file is not written anew."""
_GROWTH = 4
"""From one time that it is written anew to the next."""


class CountersLine(BaseModel):
    """A line of the file about what the replicas have done."""

    replicas: dict[str, ServiceMetrics]
    ended: ServiceMetrics
    """The sum of those that are not kept one by one."""


Line = CountersLine | RunLine
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


class BoardFile:
    """See the module. A disk that is full costs lines, never an answer: they are counted, and serving goes
    on."""

    def __init__(self, path: Path, teacher: str) -> None:
        """Raises ValueError where the file is no board's, or that of another teacher than the one with the
        fingerprint ``teacher``."""
        self._path, self._teacher = path, teacher
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="board")  # one: lines keep their order
        self._num_bytes, self._next_bytes = 0, _LEAST_BYTES
        self._torn = False
        self.corrupt = 0
        """Lines that were damaged, and left out."""
        self.not_written = 0
        """Lines that the disk did not take."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                self._check(file.readline())

    def read(self, take: Callable[[Line], None]) -> None:
        """Gives each line to ``take``; one that is damaged, as the last one may be after a kill, is named and
        counted."""
        if not self._path.exists():
            return
        for number, line in enumerate(self._path.read_bytes().split(b"\n"), 1):
            if number == 1 or not line:
                continue
            try:
                take(_LINE.validate_json(line))
            except ValueError as error:
                self.corrupt += 1
                logger.warning(
                    "%s: line %d is damaged and left out: %s: %.80r",
                    self._path,
                    number,
                    type(error).__name__,
                    line,
                )

    def start(self, lines: Sequence[Line]) -> None:
        """Writes what was read anew, so that what is appended follows whole lines."""
        self._try(lambda: self._rewrite(lines))

    async def append(self, line: Line, everything: Callable[[], Sequence[Line]]) -> None:
        """Adds a line. ``everything``: what the file is to hold where it has grown, and is written anew
        instead."""
        if self._num_bytes > self._next_bytes:
            self._next_bytes *= 2  # also where the disk does not take it: not again at the next line
            lines = everything()
            await asyncio.get_running_loop().run_in_executor(
                self._thread, self._try, lambda: self._rewrite(lines)
            )
        else:
            await asyncio.get_running_loop().run_in_executor(
                self._thread, self._try, lambda: self._append(line)
            )

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._torn = True
            self.not_written += 1
            logger.warning("%s: the board could not be written, serving goes on: %s", self._path, error)

    def _append(self, line: Line) -> None:
        with self._path.open("a") as file:
            file.write("\n" * self._torn + _text(line))  # what follows half a line is not lost with it
            self._num_bytes = file.tell()
        self._torn = False

    def _rewrite(self, lines: Sequence[Line]) -> None:
        """Puts ``lines`` in the place of all that is there, at once or not at all."""
        header = {"format": _FORMAT, "teacher": self._teacher}
        content = (json.dumps(header) + "\n" + "".join(map(_text, lines))).encode()
        write_whole(self._path, content, synced=True)
        self._num_bytes = len(content)
        self._torn, self._next_bytes = False, max(_LEAST_BYTES, _GROWTH * self._num_bytes)

    def _check(self, first: bytes) -> None:
        try:
            header = json.loads(first)
            identity = (header["format"], header["teacher"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"got --board-file {self._path}, which is no board of a teacher service: give another path"
            ) from error
        if identity != (_FORMAT, self._teacher):
            raise ValueError(
                f"got --board-file {self._path} of teacher {str(identity[1])[:12]} ({identity[0]}), expected"
                f" {self._teacher[:12]} ({_FORMAT}): losses under two teachers do not compare, so give this"
                " one a file of its own"
            )


def _text(line: Line) -> str:
    return line.model_dump_json(exclude_none=True, exclude_defaults=isinstance(line, CountersLine)) + "\n"
