"""A TCP link to a teacher service that damages answers, and what the tests of faults share."""

import contextlib
import dataclasses
import re
import socket
import threading
import time
from collections.abc import Callable

from salt_distill.common.targets import wire

Fault = Callable[[bytes, bytes], bytes | None]
"""Head and body of an answer -> the bytes to send instead, after which the link is cut unless they are a
whole answer; None: nothing at all."""


class SparedError(Exception):
    """There is nothing in an answer that a fault could harm."""


class Link:
    """Stands between a client and a service. Every ``every``-th answer of ``POST /v1/targets`` goes through
    ``fault``; for one that it spares, the next."""

    def __init__(self, url: str) -> None:
        self.target = url
        self.fault: Fault | None = None
        self.every = 1
        self.is_down: Callable[[], bool] = lambda: False
        self.num_spoilt = self.num_answers = 0
        self._num_spared = 0
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets: set[socket.socket] = set()
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:  # closed
                return
            self._sockets.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, EOFError):
            reader = client.makefile("rb")
            while True:
                head, body = _read(reader)
                if self.is_down():
                    return
                answer = self._ask(head, body)
                if head.startswith(b"POST /v1/targets"):
                    answer, whole = self._spoil(*answer)
                    if answer is not None:
                        client.sendall(answer)
                    if not whole:
                        return
                else:
                    client.sendall(b"".join(answer))

    def _ask(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        host, port = self.target.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as service:
            service.sendall(head + body)
            return _read(service.makefile("rb"))

    def _spoil(self, head: bytes, body: bytes) -> tuple[bytes | None, bool]:
        with self._lock:
            self.num_answers += 1
            instead = min(self._num_spared, 1)
            if self.fault is None or not (instead or self.num_answers % self.every == 0):
                return head + body, True
            self._num_spared -= instead
        try:
            answer = self.fault(head, body)
        except SparedError:
            with self._lock:
                self._num_spared += 1
            return head + body, True
        with self._lock:
            self.num_spoilt += 1
        sent = b"" if answer is None else answer.partition(b"\r\n\r\n")[2]
        return answer, answer is not None and len(sent) == _length(answer.partition(b"\r\n\r\n")[0])


@contextlib.contextmanager
def linked(url: str):
    """A ``Link`` to a service."""
    link = Link(url)
    try:
        yield link
    finally:
        link.close()


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)content-length: *(\d+)", head)
    return 0 if found is None else int(found.group(1))


def _read(reader) -> tuple[bytes, bytes]:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = reader.readline()
        if not line:
            raise EOFError
        head += line
    return head, reader.read(_length(head))


def with_length(head: bytes, length: int) -> bytes:
    return re.sub(rb"(?i)(content-length: *)\d+", rb"\g<1>" + str(length).encode(), head)


# --- faults ---


def dropped(head: bytes, body: bytes) -> None:
    """The link is cut instead of an answer."""


def truncated(head: bytes, body: bytes) -> bytes:
    return head + body[: len(body) // 2]


def announced_too_long(head: bytes, body: bytes) -> bytes:
    """A length that nobody has the memory for."""
    return with_length(head, 10**13) + body


def too_long(head: bytes, body: bytes) -> bytes:
    return with_length(head, len(body) + 10**6) + body + bytes(10**6)


def flipped(place: float) -> Fault:
    """A bit, at a fraction of the body."""

    def flip(head: bytes, body: bytes) -> bytes:
        damaged = bytearray(body)
        damaged[int(place * (len(body) - 1))] ^= 1
        return head + bytes(damaged)

    return flip


def zeroed(head: bytes, body: bytes) -> bytes:
    return head + bytes(len(body))


def busy(head: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0.2\r\nContent-Length: 4\r\n\r\nbusy"


def slow(seconds: float) -> Fault:
    def wait(head: bytes, body: bytes) -> bytes:
        time.sleep(seconds)
        return head + body

    return wait


def rewritten(
    change: Callable[
        [wire.ResponseHeader, list[wire.ResponseRow]], tuple[wire.ResponseHeader, list[wire.ResponseRow]]
    ],
) -> Fault:
    """An answer that is whole, and another one."""

    def rewrite(head: bytes, body: bytes) -> bytes:
        before = wire.read_response(body)
        after = change(*before)
        if after == before:
            raise SparedError
        other = b"".join(wire.write_response(*after))
        return with_length(head, len(other)) + other

    return rewrite


def _with_rows(rows_of: Callable[[list[wire.ResponseRow]], list[wire.ResponseRow]]) -> Fault:
    def change(header, rows):
        leased = {rows[number].clip_digest for number in header.leased}
        rows = rows_of(rows)
        numbers = tuple(number for number, row in enumerate(rows) if row.clip_digest in leased)
        return dataclasses.replace(header, leased=numbers), rows

    return rewritten(change)


reordered = _with_rows(lambda rows: rows[::-1])
duplicated = _with_rows(lambda rows: [*rows, rows[0]])
lacking = _with_rows(lambda rows: rows[:-1])
other_digest = _with_rows(lambda rows: [dataclasses.replace(rows[0], clip_digest=bytes(32)), *rows[1:]])
half_a_target = _with_rows(
    lambda rows: [
        dataclasses.replace(
            row,
            encoded=row.encoded
            and dataclasses.replace(row.encoded, target=memoryview(row.encoded.target)[::2].tobytes()),
        )
        for row in rows
    ]
)
"""Faults of whole rows."""
other_shape = rewritten(
    lambda header, rows: (dataclasses.replace(header, shape=(header.shape[0], header.shape[1] + 1)), rows)
)
