"""Requests to a teacher service: its routes, over kept-alive connections. By ``http.client``, since it reads
targets into buffers that we already have, which the clients of the usual libraries cannot."""

import http.client
import logging
import re
import secrets
import socket
import ssl
import threading
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass

import pydantic

from salt_distill.common.config import ServiceClientConfig, explain
from salt_distill.common.credentials import authorization, trusted
from salt_distill.common.deadline import Deadline, new_connection
from salt_distill.common.foreign_answer import in_words, is_web_page
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.protocol import (
    ARROW_TYPE,
    RETRIED_STATUSES,
    ErrorBody,
    Header,
    HttpStatus,
    Progress,
    Route,
    Standing,
    TeacherFacts,
)
from salt_distill.common.targets import wire
from salt_distill.student_trainer.targets.retry import Retries, RetryableError

logger = logging.getLogger(__name__)

_MAX_JSON_BYTES = 1 << 20
"""Largest answer that is no target, in bytes."""
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class TeacherMismatchError(ValueError):
    """Targets come from another teacher, or one that runs otherwise, than the run was started with."""


def require_same_teacher(got: TeacherSpec, expected: TeacherSpec) -> None:
    """Raises TeacherMismatchError unless both give the same bits."""
    if (got.fingerprint, got.compute) != (expected.fingerprint, expected.compute):
        raise TeacherMismatchError(
            f"got targets of teacher {got.fingerprint[:12]} computed with {got.compute}, this run uses"
            f" {expected.fingerprint[:12]} with {expected.compute}: go back to the first teacher, or start a"
            " new run"
        )


@dataclass
class ClientCounters:
    """What a client has done."""

    requests: int = 0
    """Requests answered."""
    reconnects: int = 0
    """Kept-alive connections that the server had closed meanwhile."""
    bytes_up: int = 0
    """Bytes of request bodies."""
    bytes_down: int = 0
    """Bytes of response bodies."""
    progress_failures: int = 0
    """Progress reports that the service did not take."""


class ServiceClient:
    """One service's routes. Thread-safe: each thread has its own connection."""

    def __init__(
        self,
        url: str,
        config: ServiceClientConfig,
        run: str,
        *,
        for_ever: bool = False,
        token: str | None = None,
        ca: str | None = None,
    ) -> None:
        """``for_ever``: the retry budget has no end. ``token``: what the service knows the run by. ``ca``:
        see ``trusted``."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None or parts.query or parts.fragment:
            raise ValueError(
                f"got the teacher URL {url!r}, expected http://HOST:PORT or https://HOST:PORT, as `salt-serve"
                " teacher` prints it"
            )
        self._parts, self._path = parts, parts.path.rstrip("/")
        self._config, self._run, self.url = config, run, url.rstrip("/")
        self._authorization = authorization(token)
        self._tls = trusted(ca) if parts.scheme == "https" else None
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self.retries = Retries(
            self.url, None if for_ever else config.retry_budget_s, connect_budget_s=config.connect_budget_s
        )
        self.counters = ClientCounters()

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to a counter, from any thread."""
        with self._lock:
            setattr(self.counters, name, getattr(self.counters, name) + amount)

    def teacher(self) -> TeacherFacts:
        """``GET /v1/teacher``."""
        return self.retries(self._facts)

    def targets(
        self, body: wire.Body, fingerprint: str, *, max_bytes: int, bucket: int | None = None
    ) -> memoryview:
        """``POST /v1/targets``, one try: an answer of at most ``max_bytes``, valid until this thread's next
        request.

        Raises RetryableError, TeacherMismatchError, and ValueError where the request is at fault.
        """
        headers = {
            "Content-Type": ARROW_TYPE,
            Header.RUN: self._run,
            Header.TEACHER: fingerprint,
            Header.DEADLINE_MS: str(int(1000 * self._config.timeout_s)),
            **({} if bucket is None else {Header.BUCKET: str(bucket)}),
        }
        answer = self._send("POST", Route.TARGETS, body, headers, max_bytes)
        self.count("requests")
        self.count("bytes_up", sum(map(len, body)))
        self.count("bytes_down", len(answer))
        return answer

    def progress(self, report: Progress) -> Standing | None:
        """``POST /v1/runs/{id}/progress``, one try. None without a group, and where the board does not
        answer: that is counted, and stops no run."""
        try:
            answer = self._send(
                "POST",
                Route.PROGRESS.format(run=self._run),
                report.model_dump_json(exclude_none=True).encode(),
                {"Content-Type": "application/json"},
            )
            return None if report.group is None else Standing.model_validate_json(bytes(answer))
        except (RetryableError, ValueError) as error:
            self.progress_failed(error)
            return None

    def progress_failed(self, reason: Exception) -> None:
        """Counts a report that the service did not take, or could not."""
        self.count("progress_failures")
        logger.warning("the teacher's board did not take a progress report: %s", reason)

    def probe(self) -> None:
        """One ``GET /readyz``: where the service is ready again, the circuit closes. See Note [circuit]."""
        try:
            self._send("GET", Route.READY)
        except (RetryableError, ValueError) as error:
            logger.info("teacher %s is still away: %s", self.url, error)
        else:
            self.retries.mend()

    def close(self) -> None:
        """Ends every wait, in every thread."""
        self.retries.close()
        with self._lock:
            for connection in self._connections:
                if connection.sock is not None:
                    with suppress(OSError):  # not connected any more
                        connection.sock.shutdown(
                            socket.SHUT_RDWR
                        )  # closing alone does not wake who reads from it

    def _facts(self) -> TeacherFacts:
        content = bytes(self._send("GET", Route.TEACHER))
        if is_web_page(content):
            raise ValueError(
                f"{self.url} answers with {in_words(content)}, expected a teacher service: give the URL as"
                " `salt-serve teacher` prints it"
            )
        try:
            return TeacherFacts.model_validate_json(content)
        except pydantic.ValidationError as error:
            raise RetryableError(f"a damaged answer: {explain(error)}") from error

    def _send(
        self,
        method: str,
        path: str,
        body: wire.Body | bytes | None = None,
        headers: dict[str, str] | None = None,
        max_bytes: int = _MAX_JSON_BYTES,
    ) -> memoryview:
        connection, buffer = self._connection(), self._buffer(max(max_bytes, _MAX_JSON_BYTES))
        was_open, request_id = connection.sock is not None, secrets.token_hex(6)
        sent = {
            **self._authorization,
            Header.REQUEST: request_id,
            Header.RETRY: str(self.retries.tried),
            **(headers or {}),
        }
        deadline = Deadline.after(self._config.timeout_s, "client.timeout_s")
        deadline.bounds(connection)
        pieces = [body] if isinstance(body, bytes) else body
        if pieces is not None:
            sent["Content-Length"] = str(sum(map(len, pieces)))
        try:
            connection.request(
                method,
                self._path + path,
                body=None if pieces is None else deadline.in_time(pieces, connection),
                headers=sent,
            )
            response = connection.getresponse()
            content = _read(response, buffer[:max_bytes])
        except ssl.SSLCertVerificationError as error:
            connection.close()
            raise ValueError(
                f"{self.url} shows no certificate that is trusted: {error.verify_message}: give"
                " --teacher-ca FILE"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if not self.retries.was_reached and _speaks_otherwise(error):
                raise ValueError(
                    f"{self.url} does not speak {self._parts.scheme}: {error}: give the URL as `salt-serve"
                    " teacher` prints it"
                ) from error
            if not was_open or not isinstance(error, ConnectionError) or self.retries.is_closed:
                raise RetryableError(f"{type(error).__name__}: {error} (request {request_id})") from error
            # A server closes idle connections as it likes; requests are pure, so they are sent again at once.
            self.count("reconnects")
            return self._send(method, path, body, headers, max_bytes)
        if response.status < 300:
            self.retries.was_reached = True
            return content
        refusal = _said_by_the_service(bytes(content))
        self.retries.was_reached |= refusal is not None
        raise _refusal(response, refusal, in_words(bytes(content)), request_id)

    def _connection(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = new_connection(self._parts, self._tls, self._config.timeout_s)
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection

    def _buffer(self, num_bytes: int) -> memoryview:
        """This thread's own, which all its answers are read into."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._local.buffer = memoryview(bytearray(num_bytes))
        return buffer


def _speaks_otherwise(error: Exception) -> bool:
    """Whether something else than HTTP, or than TLS, has answered."""
    if isinstance(error, ssl.SSLError):
        return not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)  # a server that just ends
    is_bad = isinstance(error, http.client.BadStatusLine)
    return is_bad and not isinstance(error, http.client.RemoteDisconnected)


def _read(response: http.client.HTTPResponse, into: memoryview) -> memoryview:
    """The body, in the first bytes of ``into``. Raises HTTPException where it is longer, or shorter than
    announced."""
    length = response.length  # None for a chunked body: from a proxy
    if length is not None and length > len(into):
        raise http.client.HTTPException(f"got a body of {length} bytes, expected at most {len(into)}")
    done = 0
    while got := response.readinto(into[done : len(into) if length is None else length]):
        done += got
    if length is not None and done < length:
        raise http.client.IncompleteRead(b"", length - done)
    if response.read(1):  # else the end of the message, after which the connection can be used again
        raise http.client.HTTPException(
            f"got a body of more than the {len(into)} bytes that were expected at most"
        )
    return into[:done]


def _said_by_the_service(content: bytes) -> ErrorBody | None:
    """An error answer of the service itself; None: a proxy's page, also while the service starts, or another
    server's."""
    try:
        return ErrorBody.model_validate_json(content)
    except ValueError:
        return None


def _refusal(
    response: http.client.HTTPResponse, body: ErrorBody | None, said: str, request_id: str
) -> Exception:
    """What an error answer means; ``said``: what it says where it is not the service's own."""
    if body is not None:
        said = f"{body.error}: got {body.got}, expected {body.expected} ({body.hint})"
    sentence = f"{response.status} {said} (request {request_id})"
    if response.status in RETRIED_STATUSES or (response.status == HttpStatus.NOT_FOUND and body is None):
        return RetryableError(sentence, _retry_after_s(response.getheader("Retry-After", "")))
    if response.status == HttpStatus.OTHER_TEACHER:
        return TeacherMismatchError(f"{sentence}. Fix --teacher-url or start a new run")
    return ValueError(f"the teacher refused a request: {sentence}")


def _retry_after_s(header: str) -> float:
    """Seconds; 0 where it says none, or a date."""
    return float(header) if _SECONDS.fullmatch(header) else 0.0
