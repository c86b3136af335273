"""Requests and answers that end at a time, however slowly their bytes come or go."""

import functools
import http.client
import io
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from typing_extensions import Buffer

from salt_distill.common.targets import wire

_READ_BYTES = 1 << 16
"""Of the buffer that heads and small bodies are read through."""


@dataclass(frozen=True)
class Deadline:
    """The time until which a whole request and its answer may take."""

    at_s: float
    """On the monotonic clock."""
    limit: str
    """What set it, for the error."""

    @classmethod
    def after(cls, seconds: float, limit: str) -> Self:
        """From now on."""
        return cls(time.monotonic() + seconds, limit)

    def left_s(self) -> float:
        """Seconds until then. Raises TimeoutError past it."""
        remaining_s = self.at_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError(f"the time for a whole answer, {self.limit}, is over")
        return remaining_s

    def bounds(self, connection: http.client.HTTPConnection) -> None:
        """Has the next answer of a connection end in time."""
        vars(connection)["response_class"] = functools.partial(_TimedResponse, deadline=self)

    def in_time(
        self, pieces: wire.Body | list[bytes], connection: http.client.HTTPConnection
    ) -> Iterator[Buffer]:
        """The pieces of a body, each to be taken in time."""
        for piece in pieces:
            if connection.sock is not None:
                connection.sock.settimeout(self.left_s())
            yield piece


def new_connection(
    url: urllib.parse.SplitResult, tls: ssl.SSLContext | None, timeout_s: float
) -> http.client.HTTPConnection:
    """To the host of a URL, encrypted where ``tls`` says whom to trust; not opened yet."""
    host = url.hostname
    assert host is not None, "who asks has checked it"
    if tls is None:
        return http.client.HTTPConnection(host, url.port, timeout=timeout_s)
    return http.client.HTTPSConnection(host, url.port, timeout=timeout_s, context=tls)


class _TimedResponse(http.client.HTTPResponse):
    """A response that ends at a time, however slowly its bytes come: a socket's own time-out begins anew with
    each of them."""

    def __init__(self, sock: socket.socket, *, deadline: Deadline, **named: Any) -> None:
        super().__init__(sock, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(sock, deadline), _READ_BYTES)


class _TimedReader(io.RawIOBase):
    """What a socket receives until a time."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline
        self._file = sock.makefile("rb", buffering=0)  # keeps the socket while the response is read
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Raises TimeoutError past the time."""
        try:
            self._sock.settimeout(self._deadline.left_s())
            num_bytes = self._file.readinto(buffer)
        except TimeoutError as error:
            raise TimeoutError(
                f"got {self._num_bytes} bytes in the time for a whole answer, {self._deadline.limit}"
            ) from error
        self._num_bytes += num_bytes or 0
        return num_bytes

    def close(self) -> None:
        self._file.close()
        super().close()
