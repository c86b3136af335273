"""Requests to a teacher service: kept-alive connections, retries within a budget. By ``http.client``: it reads into our own buffers."""

import http.client
import json
import logging
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import Buffer

from common.config import ServiceClientConfig
from common.model.teacher import TeacherSpec
from common.targets import wire

T = TypeVar("T")

log = logging.getLogger("salt.client")

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0


class TeacherMismatchError(RuntimeError):
    """Targets come from another teacher, or one that runs otherwise, than the run was started with."""


def require_same_teacher(got: TeacherSpec, expected: TeacherSpec) -> None:
    """Raises TeacherMismatchError unless both give the same bits."""
    if (got.fingerprint, got.compute) != (expected.fingerprint, expected.compute):
        raise TeacherMismatchError(
            f"got targets of teacher {got.fingerprint[:12]} computed with {got.compute}, this run uses {expected.fingerprint[:12]} with "
            f"{expected.compute}: go back to the first teacher, or start a new run"
        )


class TeacherUnavailableError(ConnectionError):
    """The teacher service did not answer within the budget."""


class RetryableError(RuntimeError):
    """An answer that another try may better."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass
class ClientCounters:
    """What a client has done."""

    requests: int = 0
    """Requests answered."""
    retries: int = 0
    """Requests repeated after a failure."""
    reconnects: int = 0
    """Kept-alive connections that the server had closed meanwhile."""
    bytes_up: int = 0
    """Bytes of request bodies."""
    bytes_down: int = 0
    """Bytes of response bodies."""
    progress_failures: int = 0
    """Progress reports that the service did not take."""


class TeacherClient:
    """One service's routes. Thread-safe: each thread has its own connection."""

    def __init__(self, url: str, config: ServiceClientConfig, run: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None or parts.query or parts.fragment:
            raise ValueError(
                f"got the teacher URL {url!r}, expected http://HOST:PORT or https://HOST:PORT, as `salt-serve teacher` prints it"
            )
        self._parts, self._path = parts, parts.path.rstrip("/")
        self._config, self._run, self.url = config, run, url.rstrip("/")
        self._local = threading.local()
        self._connections: set[http.client.HTTPConnection] = set()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self.counters = ClientCounters()

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to a counter, from any thread."""
        with self._lock:
            setattr(self.counters, name, getattr(self.counters, name) + amount)

    def teacher(self) -> dict[str, Any]:
        """``GET /v1/teacher``."""
        return self.retrying(lambda: json.loads(self._send("GET", "/v1/teacher", None, {})))

    def targets(self, body: Buffer, fingerprint: str) -> bytearray:
        """``POST /v1/targets``, one try. Raises RetryableError, TeacherMismatchError, and ValueError where the request is at fault."""
        headers = {"Content-Type": wire.CONTENT_TYPE, "X-Salt-Run": self._run, "X-Salt-Teacher": fingerprint}
        answer = self._send("POST", "/v1/targets", body, headers)
        self.count("requests")
        self.count("bytes_up", memoryview(body).nbytes)
        self.count("bytes_down", len(answer))
        return answer

    def progress(self, values: dict[str, Any]) -> None:
        """``POST /v1/runs/{id}/progress``, one try. A board that does not answer is counted, and stops no run."""
        try:
            self._send("POST", f"/v1/runs/{self._run}/progress", json.dumps(values).encode(), {"Content-Type": "application/json"})
        except (RetryableError, ValueError) as error:
            self.count("progress_failures")
            log.warning("the teacher's board did not take a progress report: %s", error)

    def retrying(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns; after RetryableError it is tried again, with backoff and jitter.

        Raises TeacherUnavailableError when the budget is spent.
        """
        started = time.monotonic()
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return attempt()
            except RetryableError as error:
                wait_s = max(error.after_s, pause_s * random.uniform(0.5, 1.0))
                spent_s = time.monotonic() - started
                if self._closed.is_set() or spent_s + wait_s > self._config.retry_budget_s:
                    raise TeacherUnavailableError(
                        f"the teacher at {self.url} failed for {spent_s:.1f} s, and the budget is "
                        f"client.retry_budget_s={self._config.retry_budget_s:g}: {error}. Start it again and repeat the run with --resume"
                    ) from error
                self.count("retries")
                log.warning("teacher %s: %s; trying again in %.1f s", self.url, error, wait_s)
                self._closed.wait(wait_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Ends every wait, in every thread."""
        self._closed.set()
        with self._lock:
            for connection in self._connections:
                if connection.sock is not None:
                    with suppress(OSError):  # not connected any more
                        connection.sock.shutdown(socket.SHUT_RDWR)  # closing alone does not wake who reads from it

    def _send(self, method: str, path: str, body: Buffer | None, headers: dict[str, str]) -> bytearray:
        connection = self._connection()
        was_open = connection.sock is not None
        try:
            return self._exchange(connection, method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if not was_open or not isinstance(error, ConnectionError) or self._closed.is_set():
                raise RetryableError(f"{type(error).__name__}: {error}") from error
        self.count("reconnects")  # a server closes idle connections as it likes; requests are pure, so they can be sent again at once
        return self._send(method, path, body, headers)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Buffer | None, headers: dict[str, str]
    ) -> bytearray:
        connection.request(method, self._path + path, body=None if body is None else memoryview(body), headers=headers)
        response = connection.getresponse()
        content = _read(response)
        if response.status < 300:
            return content
        raise _refusal(response, content)

    def _connection(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            assert self._parts.hostname is not None
            connection = kind(self._parts.hostname, self._parts.port, timeout=self._config.timeout_s)
            self._local.connection = connection
            with self._lock:
                self._connections.add(connection)
        return connection


def _read(response: http.client.HTTPResponse) -> bytearray:
    """The body, in one buffer of its own size."""
    if response.length is None:  # chunked: from a proxy
        return bytearray(response.read())
    content = bytearray(response.length)
    view, done = memoryview(content), 0
    while done < len(content):
        got = response.readinto(view[done:])
        if not got:
            raise http.client.IncompleteRead(bytes(content[:done]), len(content) - done)
        done += got
    response.read()  # the end of the message, so that the connection can be used again
    return content


def _refusal(response: http.client.HTTPResponse, content: bytearray) -> Exception:
    """What an error answer means."""
    sentence = _sentence(response.status, content)
    if response.status in _RETRIED:
        after = response.getheader("Retry-After", "0")
        return RetryableError(sentence, float(after) if after.replace(".", "", 1).isdigit() else 0.0)
    if response.status == 409:
        return TeacherMismatchError(f"{sentence}. Fix --teacher-url or start a new run")
    return ValueError(f"the teacher refused a request: {sentence}")


def _sentence(status: int, content: bytearray) -> str:
    try:
        body = json.loads(content)
        return f"{status} {body['error']}: got {body['got']}, expected {body['expected']} ({body['hint']})"
    except (ValueError, KeyError, TypeError):  # not from the service: a proxy's page
        return f"{status}: {bytes(content[:200]).decode(errors='replace')}"
