"""What every request passes first: it gets an id, shows its token, and leaves a line in the log."""

import json
import logging
import logging.handlers
import queue
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from salt_distill.common.protocol import Header, Route
from salt_distill.teacher_server.board.counters import Counters
from salt_distill.teacher_server.http.access import ANYONE, PEER, Token, Tokens
from salt_distill.teacher_server.http.errors import ApiError
from salt_distill.teacher_server.sharing import peers

OPEN_PATHS = frozenset({Route.PAGE, Route.ALIVE, Route.READY})
"""What needs no token: the page, which holds no data, and what a load balancer asks."""

_OF_RUNS = re.compile(r"/v1/targets|/v1/runs/[^/]+/progress")
"""What a token of runs may POST to; everything else that changes something takes an operator's."""
_SAFE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_CLIPS = 16
"""Clips that a line of the log names."""


@dataclass
class Note:
    """What is known of a request: its line in the log. No pixel, no secret."""

    request: str
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
        self.clips = [digest.hex()[:12] for digest in clip_digests[:_MOST_CLIPS]]
        self.num_clips, self.bytes_in = len(clip_digests), num_bytes


class Front:
    """Middleware around the whole app, so that no route can be forgotten."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        secret: peers.PeerSecret,
        tokens: Tokens | None,
        counters: Counters,
        log: "RequestLog | None",
    ) -> None:
        self._app, self._secret, self._tokens, self._counters, self._log = app, secret, tokens, counters, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.perf_counter()
        status: int | None = None
        given = headers.get(Header.REQUEST, "")
        request_id = given if _SAFE.fullmatch(given) else secrets.token_hex(6)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[Header.REQUEST] = request_id
            await send(message)

        note = Note(request=request_id, token=ANYONE)
        scope.setdefault("state", {})["note"] = note
        try:
            try:
                note.token = self._token(scope, headers)
            except ApiError as error:
                await error.response()(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
                status = status or 499  # its client left
        finally:  # without a status: an error that nobody expected, which is answered further out
            self._ended(scope, headers, note, status or 500, time.perf_counter() - started)

    def _token(self, scope: Scope, headers: Headers) -> Token:
        """Whose request it is. Raises ApiError 401 or 403."""
        if (passed := headers.get(Header.PASSED)) is not None:
            if not self._secret.is_it(passed):
                hint = f"leave the header {Header.PASSED} out: it is for the replicas among themselves"
                raise ApiError(
                    401,
                    "not a replica of this teacher",
                    expected="the secret of its replicas",
                    got="another one",
                    hint=hint,
                )
            return PEER
        path = _path(scope)
        if self._tokens is None or path in OPEN_PATHS:
            return ANYONE
        token = self._tokens.find(headers.get("authorization"))
        if scope["method"] not in ("GET", "HEAD") and _OF_RUNS.fullmatch(path) is None:
            token.require_operator()
        return token

    def _ended(self, scope: Scope, headers: Headers, note: Note, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        if note.token is not PEER:
            self._counters.answered(route, status, seconds, is_retry=headers.get(Header.RETRY, "0") != "0")
        if self._log is not None:
            self._log.write(scope["method"], route, status, seconds, note)


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

    def write(self, method: str, route: str, status: int, seconds: float, note: Note) -> None:
        """One request."""
        line = {
            "event": "request",
            "request": note.request,
            "run": note.run,
            "token": note.token.name,
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            **(
                {}
                if not note.num_clips
                else {"num_clips": note.num_clips, "clips": note.clips, "num_computed": note.num_computed}
            ),
            **({} if not note.num_clips else {"bytes_in": note.bytes_in, "bytes_out": note.bytes_out}),
        }
        record = logging.LogRecord("salt.requests", logging.INFO, "", 0, "request", None, None)
        record.line = line
        self._handler.emit(record)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = getattr(record, "line", None) or {"event": "message", "message": record.getMessage()}
        return json.dumps({"time_s": round(record.created, 3), "level": record.levelname.lower(), **line})


def _path(scope: Scope) -> str:
    """The path below where the app is mounted, as the router sees it."""
    root, path = scope.get("root_path", ""), scope["path"]
    return path[len(root) :] if root and (path == root or path.startswith(f"{root}/")) else path
