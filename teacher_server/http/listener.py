"""Ports that a replica listens on itself, besides Ray Serve's: for the other replicas, and for its clients
where TLS ends in it."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from salt_distill.common.protocol import Header
from salt_distill.teacher_server.http.errors import ApiError


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
            http=_protocol(header_timeout_s),
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
                401,
                error,
                expected=Header.PASSED,
                got="no such header",
                hint="ask the URL that `salt-serve teacher` prints",
            )
            await refusal.response()(scope, receive, send)
        else:
            await app(scope, receive, send)

    return behind


class _Guest(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _protocol(header_timeout_s: float) -> Any:
    """uvicorn's own, which closes a connection whose next head does not come in time. By itself it would wait
    for ever for half a head."""
    base: Any = AutoHTTPProtocol

    class Impatient(base):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if (
                self.cycle is not None and not self.cycle.response_complete
            ):  # a request is being read or answered
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(header_timeout_s, self.transport.abort)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Impatient
