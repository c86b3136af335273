"""What every request passes first: it gets an id, shows its token, and leaves a line in the log."""

import ipaddress
import json
import logging
import logging.handlers
import queue
import re
import secrets
import socket
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from salt_distill.common.metrics import ServiceMetrics
from salt_distill.common.protocol import ID_PATTERN, Header, HttpStatus, Route
from salt_distill.teacher_server.http.access import ANYONE, PEER, Token, Tokens
from salt_distill.teacher_server.http.errors import ApiError
from salt_distill.teacher_server.http.listener import MAX_HEAD_BYTES, head_too_large
from salt_distill.teacher_server.sharing.peers import Peers

OPEN_PATHS = frozenset({Route.PAGE, Route.ALIVE, Route.READY})
"""What needs no token: the page, which holds no data, and what a load balancer asks."""

_OF_RUNS = re.compile(f"{Route.TARGETS}|{Route.PROGRESS.format(run='[^/]+')}")
"""What a token of runs may POST to; everything else that changes something takes an operator's."""
_ID = re.compile(ID_PATTERN)
_MAX_NAMED_CLIPS = 16
"""Clips that a line of the log names."""
_POLICY = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Said with every answer: a browser loads nothing for it, and shows it in no other page. Pages say their
own."""
_NOBODYS_DOMAINS = (".localhost", ".local", ".internal", ".home.arpa")
"""Domains that nobody can register, so that no web page comes from them."""


@dataclass
class RequestRecord:
    """What is known of a request: its line in the log. No pixel, no secret."""

    request: str
    """Its id."""
    token: Token
    run: str = "-"
    clips: list[str] = field(default_factory=list)
    """The first ones, by the first 12 digits of their digests."""
    num_clips: int = 0
    num_computed: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def asks(self, clip_digests: list[bytes], num_bytes: int) -> None:
        """Notes what a request for targets asks for."""
        self.clips = [digest.hex()[:12] for digest in clip_digests[:_MAX_NAMED_CLIPS]]
        self.num_clips, self.bytes_in = len(clip_digests), num_bytes


class Front:
    """Middleware around the whole app, so that no route can be forgotten."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        peers: Peers,
        tokens: Tokens | None,
        hosts: tuple[str, ...],
        metrics: ServiceMetrics,
        log: "RequestLog | None",
    ) -> None:
        """``hosts``: names, beside addresses and this machine's, that a service without tokens answers to."""
        self._app, self._peers, self._tokens, self._metrics, self._log = app, peers, tokens, metrics, log
        self._hosts = frozenset(host.lower() for host in (*hosts, socket.gethostname(), socket.getfqdn()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.perf_counter()
        status: int | None = None
        given_id = headers.get(Header.REQUEST, "")
        request_id = given_id if _ID.fullmatch(given_id) else secrets.token_hex(6)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered[Header.REQUEST] = request_id
                for name, value in _POLICY.items():
                    answered.setdefault(name, value)
            await send(message)

        record = RequestRecord(request=request_id, token=ANYONE)
        scope.setdefault("state", {})["record"] = record
        try:
            try:
                record.token = self._token(scope, headers)
            except ApiError as error:
                await error.response()(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
                status = status or 499  # its client left
        finally:  # without a status: an error that nobody expected, which is answered further out
            self._ended(scope, headers, record, status or 500, time.perf_counter() - started)

    def _token(self, scope: Scope, headers: Headers) -> Token:
        """Whose request it is. Raises ApiError."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
            raise head_too_large()
        if (passed := headers.get(Header.PASSED)) is not None:
            if not self._peers.is_one(passed):
                raise ApiError(
                    HttpStatus.NO_TOKEN,
                    "not a replica of this teacher",
                    expected="the secret of its replicas",
                    got="another one",
                    hint=f"leave the header {Header.PASSED} out: it is for the replicas among themselves",
                )
            return PEER
        self._require_no_other_site(headers)
        path = _path(scope)
        if self._tokens is None or path in OPEN_PATHS:
            return ANYONE
        token = self._tokens.find(headers.get("authorization"))
        if scope["method"] not in ("GET", "HEAD") and _OF_RUNS.fullmatch(path) is None:
            token.require_operator()
        return token

    def _require_no_other_site(self, headers: Headers) -> None:
        """Raises ApiError where the page of another web site asks, through the browser of somebody who may.

        A browser names that site in Origin. Where the site's own name leads here (DNS rebinding) it is in
        Host too: without tokens only addresses are taken, and names that no web site has.
        """
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise ApiError(
                HttpStatus.FORBIDDEN,
                "a page of another site asks",
                expected=f"an Origin of {host[:100]}",
                got=origin[:100],
                hint="open the service's own page, or ask without a browser",
            )
        if self._tokens is None and not self._is_a_name_of_ours(host):
            raise ApiError(
                HttpStatus.FORBIDDEN,
                "a service without tokens is reached under a name that may be anybody's",
                expected="an address, the machine's name, or one of service.hosts",
                got=host[:100],
                hint="ask by address, name the host with --set service.hosts, or give the service --tokens",
            )

    def _is_a_name_of_ours(self, host: str) -> bool:
        try:
            name = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return "." not in name or name in self._hosts or name.endswith(_NOBODYS_DOMAINS)
        return True

    def _ended(
        self, scope: Scope, headers: Headers, record: RequestRecord, status: int, seconds: float
    ) -> None:
        route = getattr(scope.get("route"), "path", "other")
        if record.token is not PEER:
            self._metrics.count_answer(route, status, is_retry=headers.get(Header.RETRY, "0") != "0")
            if route == Route.TARGETS:
                self._metrics.request.observe(seconds)
        if self._log is not None:
            self._log.write(scope["method"], route, status, seconds, record)


class RequestLog:
    """A file with a JSON line for each request and each event of the service. Written by a thread, so that no
    request waits for a disk."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.handlers.WatchedFileHandler(path)  # one that was renamed by logrotate is begun again
        file.setFormatter(_JsonLines())
        lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._handler = logging.handlers.QueueHandler(lines)
        self._listener = logging.handlers.QueueListener(lines, file)
        self._file = file

    def open(self) -> None:
        """From now on until ``close`` events of the service are written too."""
        self._listener.start()
        logging.getLogger("salt_distill").addHandler(self._handler)

    def close(self) -> None:
        """Writes what is left."""
        logging.getLogger("salt_distill").removeHandler(self._handler)
        self._listener.stop()
        self._file.close()

    def write(self, method: str, route: str, status: int, seconds: float, record: RequestRecord) -> None:
        """One request."""
        line: dict[str, str | int | float | None] = {
            "event": "request",
            "request": record.request,
            "run": record.run,
            "token": record.token.name,
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
        }
        if record.num_clips:
            names = ("num_clips", "clips", "num_computed", "bytes_in", "bytes_out")
            line |= {name: getattr(record, name) for name in names}
        entry = logging.LogRecord("salt.requests", logging.INFO, "", 0, "request", None, None)
        entry.line = line
        self._handler.emit(entry)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = getattr(record, "line", None) or {"event": "message", "message": record.getMessage()}
        return json.dumps({"time_s": round(record.created, 3), "level": record.levelname.lower(), **line})


def _netloc(url: str) -> str | None:
    """Host and port of a URL, None where it is none."""
    try:
        return urllib.parse.urlsplit(url).netloc.lower()
    except ValueError:
        return None


def _path(scope: Scope) -> str:
    """The path below where the app is mounted, as the router sees it."""
    root, path = scope.get("root_path", ""), scope["path"]
    return path[len(root) :] if root and (path == root or path.startswith(f"{root}/")) else path
