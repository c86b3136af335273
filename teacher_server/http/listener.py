"""Ports that a replica listens on itself, besides Ray Serve's: for the other replicas, and for its clients
where TLS ends in it."""

import asyncio
import http
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from salt_distill.common.protocol import Header, HttpStatus
from salt_distill.teacher_server.http.errors import ApiError

ABORT = "salt.abort"
"""Extension of a request's scope: ends its connection at once, whatever of the answer was not sent."""
MAX_HEAD_BYTES = 65_536
"""Largest head of a request."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """A certificate and its key, PEM files."""

    cert: str
    key: str


class Listener:
    """A server of an app whose life is another's matter, in a process whose signals are another's."""

    def __init__(
        self,
        app: Any,
        listening: socket.socket,
        *,
        header_timeout_s: float,
        drain_s: float = 0.0,
        tls: Tls | None = None,
    ) -> None:
        """``header_timeout_s``: how long a request's head may take."""
        config = uvicorn.Config(
            app,
            http=bounded_protocol(header_timeout_s),
            lifespan="off",
            log_level="error",
            access_log=False,
            timeout_keep_alive=120,
            timeout_graceful_shutdown=int(drain_s),
            ssl_certfile=None if tls is None else tls.cert,
            ssl_keyfile=None if tls is None else tls.key,
        )
        config.load()
        self._server, self._socket = _Guest(config), listening

    async def serve(self) -> None:
        """Until ``drain``, or until it is cancelled."""
        await self._server.serve(sockets=[self._socket])

    def drain(self) -> None:
        """Takes no more connections; ``serve`` returns when those that it has are answered, or after
        ``drain_s``."""
        self._server.should_exit = True


def bounded_protocol(header_timeout_s: float) -> type:
    """uvicorn's protocol, with bounds for the head of a request: its size, and how long it may take."""
    return type("_Bounded", (_BoundedProtocol,), {"header_timeout_s": header_timeout_s})


def tls_socket(host: str, port: int) -> socket.socket:
    """A socket that the replicas of one node share: the kernel gives each its part of the connections."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind((host, port))
    return listening


def only_peers(app: ASGIApp) -> ASGIApp:
    """The app for those who say that they are replicas of it; whether they are, it decides itself."""

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and Header.PASSED.lower().encode() not in dict(scope["headers"]):
            error = "only replicas are answered here"
            refusal = ApiError(
                HttpStatus.NO_TOKEN,
                error,
                expected=Header.PASSED,
                got="no such header",
                hint="ask the URL that `salt-serve teacher` prints",
            )
            await refusal.response()(scope, receive, send)
        else:
            await app(scope, receive, send)

    return behind


def head_too_large() -> ApiError:
    """A request whose headers have no end."""
    return ApiError(
        HttpStatus.HEAD_TOO_LARGE,
        "the head of the request is too large",
        expected=f"at most {MAX_HEAD_BYTES} bytes",
        got="more",
        hint="send fewer and shorter headers",
        headers={"Connection": "close"},
    )


class _Guest(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


_UVICORN: Any = AutoHTTPProtocol
_LINGER_S = 1.0
"""How long what a refused client still sends is dropped. Closed with bytes unread, a connection is reset, and
the client may never see the refusal."""


class _BoundedProtocol(_UVICORN):
    """uvicorn's own, which closes a connection whose next head does not come in time, or does not end. By
    itself it would wait for ever for half a head, and keep any number of its bytes."""

    header_timeout_s: float
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def on_message_begin(self) -> None:  # of httptools, which calls it for each request
        super().on_message_begin()
        self.scope.setdefault("extensions", {})[ABORT] = self.transport.abort

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        cycle, was_in_head = self.cycle, self._is_in_head()
        super().data_received(data)
        self._head_bytes = (
            self._head_bytes + len(data) if was_in_head and self.cycle is cycle and self._is_in_head() else 0
        )
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if cycle is None or cycle.response_complete:
                self._refuse()
                return
            self.transport.abort()  # in the middle of an answer nothing else can be said
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _refuse(self) -> None:
        self._stop()
        self._is_refused = True
        self.transport.write(_HEAD_TOO_LARGE)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _is_in_head(self) -> bool:
        """Whether what comes next belongs to a head: the body of the request before it is whole."""
        return self.cycle is None or not self.cycle.more_body

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being read or answered
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _raw(error: ApiError) -> bytes:
    """A refusal as it stands on the connection, for a request that reaches no app."""
    response = error.response()
    phrase = http.HTTPStatus(response.status_code).phrase
    head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    return f"HTTP/1.1 {response.status_code} {phrase}\r\n".encode() + head + b"\r\n" + bytes(response.body)


_HEAD_TOO_LARGE = _raw(head_too_large())
