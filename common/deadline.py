"""Requests and answers that end at a time, however slowly their bytes come or go."""

import http.client
import io
import socket
import time
from collections.abc import Iterator
from typing import Any

from typing_extensions import Buffer

from salt_distill.common.targets import wire

_READ_BYTES = 1 << 16
"""Of the buffer that heads and small bodies are read through."""


class TimedResponse(http.client.HTTPResponse):
    """A response that ends at a time, however slowly its bytes come: a socket's own time-out begins anew with
    each of them."""

    def __init__(self, sock: socket.socket, *, deadline_s: float, limit: str, **named: Any) -> None:
        """``limit``: what set the time, for the error."""
        super().__init__(sock, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(sock, deadline_s, limit), _READ_BYTES)


class _TimedReader(io.RawIOBase):
    """What a socket receives until a time."""

    def __init__(self, sock: socket.socket, deadline_s: float, limit: str) -> None:
        self._sock, self._deadline_s, self._limit = sock, deadline_s, limit
        self._file = sock.makefile("rb", buffering=0)  # keeps the socket while the response is read
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Raises TimeoutError past the time."""
        try:
            self._sock.settimeout(left_s(self._deadline_s))
            num_bytes = self._file.readinto(buffer)
        except TimeoutError as error:
            raise TimeoutError(
                f"got {self._num_bytes} bytes in the time for a whole answer, {self._limit}"
            ) from error
        self._num_bytes += num_bytes or 0
        return num_bytes

    def close(self) -> None:
        self._file.close()
        super().close()


def in_time(
    pieces: wire.Body | list[bytes], connection: http.client.HTTPConnection, deadline_s: float
) -> Iterator[Buffer]:
    """The pieces of a body, each to be taken before the time ends."""
    for piece in pieces:
        if connection.sock is not None:
            connection.sock.settimeout(left_s(deadline_s))
        yield piece


def left_s(deadline_s: float) -> float:
    """Seconds until a time. Raises TimeoutError past it."""
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError("the time for a whole answer, client.timeout_s, is over")
    return remaining_s
