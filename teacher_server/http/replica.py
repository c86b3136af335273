"""One replica of the teacher service: request to batch to forward to bytes."""

import asyncio
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response

from salt_distill.common.config import ServiceConfig
from salt_distill.common.protocol import ARROW_TYPE, PROTOCOL, Header
from salt_distill.common.targets import codec, wire
from salt_distill.teacher_server.board.board import Board, Ending
from salt_distill.teacher_server.board.counters import without_parts
from salt_distill.teacher_server.http.access import PEER, Tokens
from salt_distill.teacher_server.http.errors import ApiError
from salt_distill.teacher_server.http.front import Note, RequestLog
from salt_distill.teacher_server.http.limits import (
    announced_bytes,
    deadline_s,
    least,
    read_body,
    require_rate,
    too_large,
    unless_left,
)
from salt_distill.teacher_server.http.listener import Listener, Tls, only_peers
from salt_distill.teacher_server.http.pieces import InPieces
from salt_distill.teacher_server.sharing.batching import Batcher, BusyError, FrozenTeacher
from salt_distill.teacher_server.sharing.disk import DiskTargets
from salt_distill.teacher_server.sharing.exchange import Answer, Asker, Exchange
from salt_distill.teacher_server.sharing.leases import Leases
from salt_distill.teacher_server.sharing.peers import PeerSecret

log = logging.getLogger(__name__)

_RUN_ID = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,64}")
_BEAT_S = 1.0
"""From one time that a replica says to the board that it lives, and hears whether the service ends, to the
next; and so with changed tokens."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a replica stands among others."""

    board: Board
    """What the replicas share."""
    url: str = ""
    """At which the other replicas reach this one; empty where there are none."""
    listener: socket.socket | None = None
    """Where it is reached by them, if that is not where its clients reach it."""
    front: tuple[socket.socket, Tls] | None = None
    """Where its clients reach it, if it ends TLS itself."""
    buckets: int = 1
    """Into how many parts clients split a request by the digests of its clips, so that equal clips reach the
    same replica."""
    ingress: str = "uvicorn"
    """What stands between client and replica."""


class TeacherService:
    """One replica: a teacher, and everything its requests share."""

    def __init__(
        self,
        teacher: FrozenTeacher,
        config: ServiceConfig,
        place: Place,
        disk: DiskTargets | None,
        tokens: Tokens | None = None,
        log: RequestLog | None = None,
    ) -> None:
        self._config, self._place, self._disk, self._tokens, self._log = config, place, disk, tokens, log
        self.spec = teacher.spec
        self.batch_size = int(self.spec.compute["batch_size"])
        self.batcher = Batcher(
            teacher,
            batch_size=self.batch_size,
            batch_wait_s=config.batch_wait_ms / 1000,
            memory_bytes=config.memory_bytes,
            max_pending_bytes=config.max_pending_bytes,
            disk=disk,
        )
        self.leases = Leases(config.lease_s)
        self.board = place.board
        self._name = f"{place.url}#{secrets.token_hex(4)}"  # a later process may get this one's port
        self.ending = Ending.NO
        self.open_requests = 0
        self.secret = PeerSecret()
        self._exchange = Exchange(
            batcher=self.batcher,
            leases=self.leases,
            clip_shape=self.spec.clip_shape,
            board=self.board,
            replica=place.url,
            disk=disk,
            secret=self.secret,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.ready = False

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Serves between its two ends; readiness comes after the first forward, which does not delay
        liveness."""
        if self._log is not None:
            self._log.open()
        self.secret.value = await self.board.secret()
        self._tasks = [
            asyncio.create_task(task) for task in (self.batcher.run(), self._warm_up(), self._watch_tokens())
        ]
        head_s, drain_s = self._config.header_timeout_s, self._config.drain_s
        if self._place.listener is not None:
            listener = Listener(only_peers(app), self._place.listener, header_timeout_s=head_s)
            self._tasks.append(asyncio.create_task(listener.serve()))
        front = None
        if self._place.front is not None:
            listening, tls = self._place.front
            front = Listener(app, listening, header_timeout_s=head_s, drain_s=drain_s, tls=tls)
            serving = asyncio.create_task(front.serve())
        try:
            yield
        finally:
            if front is not None:
                front.drain()
                await asyncio.wait([serving])
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
            if self._place.url:
                await self.board.lost(self._place.url)
            if self._disk is not None:
                await asyncio.to_thread(self._disk.close)
            if self._log is not None:
                await asyncio.to_thread(self._log.close)

    def check(self) -> None:
        """Raises what ended the batcher or the first forward, if something did."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    def require_ready(self) -> None:
        """Raises ApiError 503 before the first forward is done and when the service ends, and what ``check``
        raises."""
        self.check()
        if self.ending:
            raise ApiError(
                503,
                "the teacher ends" if self.ending is Ending.STOP else "the teacher is drained",
                expected="a teacher that takes requests",
                got="one that only answers what it has begun",
                hint="ask again after Retry-After: another may take its place",
                retry_after_s=self._config.retry_after_s,
            )
        if not self.ready:
            raise ApiError(
                503,
                "the teacher is not ready",
                expected="a teacher that has done its first forward",
                got="one that starts",
                hint="ask again after Retry-After",
                retry_after_s=self._config.retry_after_s,
            )

    async def end(self, ending: Ending) -> None:
        """Ends this replica and, by the board, the others: nothing new is begun."""
        self.ending = max(self.ending, ending)
        await self.board.end(ending)

    async def _warm_up(self) -> None:
        await self.batcher.warm_up()
        await self._beat()
        self.ready = True
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                await self._beat()
            except ConnectionError as error:
                log.warning("the board does not answer: %s", error)

    async def _beat(self) -> None:
        """Says that this replica lives, until the board knows what it does."""
        if self._place.url and not await self.board.knows(self._place.url):
            await self.board.join(self._place.url, self.batcher.memory.clip_digests())
        before, self.ending = (
            self.ending,
            Ending(await self.board.served(self._name, self.counters(), ending=self.ending)),
        )
        if self.ending != before:
            log.warning("the service ends: no new requests for targets")
            await self.board.served(self._name, self.counters(), ending=self.ending)

    async def _watch_tokens(self) -> None:
        while self._tokens is not None:
            await asyncio.sleep(_BEAT_S)
            await asyncio.to_thread(self._tokens.reload)

    async def describe(self) -> dict[str, Any]:
        """``GET /v1/teacher``."""
        spec = self.spec.to_json()
        limits = {
            name: getattr(self._config, name)
            for name in ("max_request_bytes", "max_request_clips", "lease_s")
        }
        shared = {
            "protocol": PROTOCOL,
            "dtypes": list(codec.TARGET_DTYPES),
            "batch_size": self.batch_size,
        }
        place = {"buckets": self._place.buckets, "ingress": self._place.ingress}
        now = {
            "ready": self.ready,
            "ending": self.ending.name.lower(),
            "counters": without_parts(await self.all_counters()),
        }
        return {**spec, **shared, **place, "limits": limits, **now}

    async def all_counters(self) -> dict[str, int | float]:
        """The sums over all replicas; this one's as they are now, the others' as they were when they answered
        last."""
        await self.board.served(self._name, self.counters(), ending=self.ending)
        total = await self.board.counters()
        return {**total, "batch_fill": total["clips_computed"] / max(1, total["forwards"] * self.batch_size)}

    def counters(self) -> dict[str, int | float]:
        """What this replica has done, and what it holds now."""
        memory, disk = self.batcher.memory, self._disk
        held = {"memory_clips": len(memory), "memory_bytes": memory.num_bytes, "leases": len(self.leases)}
        on_disk = (
            {}
            if disk is None
            else {"disk_clips": len(disk), "disk_not_written": disk.not_written, "disk_corrupt": disk.corrupt}
        )
        now = {
            "queued_clips": self.batcher.queued_clips,
            "open_requests": self.open_requests,
            "draining": int(self.ending > 0),
        }
        return {**self.batcher.counters.to_json(), **held, **on_disk, **now}

    async def targets(self, request: Request) -> Response:
        """``POST /v1/targets``."""
        note: Note = request.state.note
        asker = Asker(
            run=run_id(request.headers.get(Header.RUN, "unnamed")),
            request=note.request,
            passed=note.token is PEER,
            deadline_s=deadline_s(request.headers.get(Header.DEADLINE_MS)),
        )
        note.run = asker.run
        note.token.require_run(asker.run)
        self._check_headers(request)
        most = least(note.token.max_request_bytes, self._config.max_request_bytes)
        length = announced_bytes(request, most)
        try:
            async with asyncio.timeout_at(asker.deadline_s):
                with self.batcher.admit(asker.run, length):
                    return await self._answer(request, asker, most)
        except BusyError as error:
            raise ApiError(
                429,
                str(error),
                expected=f"at most {self._config.max_pending_bytes} bytes",
                got=f"{length} bytes more",
                hint="ask again after Retry-After",
                retry_after_s=self._config.retry_after_s,
            ) from error
        except TimeoutError as error:
            self.batcher.counters.expired += 1
            raise ApiError(
                504,
                "the request's deadline has passed",
                expected=f"an answer within {Header.DEADLINE_MS}",
                got=f"{request.headers[Header.DEADLINE_MS]} ms that were too short",
                hint="ask again: what was computed meanwhile is in memory",
            ) from error

    async def _answer(self, request: Request, asker: Asker, most_bytes: int) -> Response:
        note: Note = request.state.note
        got = await read_body(request, most_bytes=most_bytes, timeout_s=self._config.body_timeout_s)
        parsed = await asyncio.to_thread(
            self._parse, got, least(note.token.max_request_clips, self._config.max_request_clips)
        )
        note.asks([row.clip_digest for row in parsed.rows], len(got))
        await require_rate(self.board, note.token, len(parsed.rows))
        counters = self.batcher.counters
        if not asker.passed:  # counted where it arrived
            counters.requests += 1
            counters.bytes_in += len(got)
        answer = await unless_left(request, self._exchange.answer(parsed, asker))
        started = time.perf_counter()
        body = await asyncio.to_thread(self._serialise, parsed, answer)
        counters.serialise.observe(time.perf_counter() - started)
        num_bytes = sum(map(len, body))
        note.num_computed, note.bytes_out = answer.num_computed, num_bytes
        sent = 0 if asker.passed else num_bytes
        counters.bytes_out += sent
        clips = 0 if asker.passed else sum(row.status == "ok" for row in answer.rows)
        computed = answer.num_computed
        told = self.board.served(
            self._name, self.counters(), asker.run, clips=clips, computed=computed, num_bytes=sent
        )
        return InPieces(body, before_the_last=asyncio.ensure_future(told))

    def _check_headers(self, request: Request) -> None:
        if self.ready and request.state.note.token is PEER:  # what another replica passes on was begun there
            self.check()
        else:
            self.require_ready()
        fingerprint = request.headers.get(Header.TEACHER, self.spec.fingerprint)
        if fingerprint != self.spec.fingerprint:
            hint = "this URL serves another teacher: correct the URL, or start a new run"
            raise ApiError(
                409,
                "another teacher is served here",
                expected=fingerprint,
                got=self.spec.fingerprint,
                hint=hint,
            )
        content_type = request.headers.get("content-type", "")
        if content_type.split(";")[0].strip() != ARROW_TYPE:
            raise ApiError(
                415,
                "the body is not Arrow",
                expected=ARROW_TYPE,
                got=content_type,
                hint="send an Arrow IPC stream",
            )

    def _parse(self, body: bytearray, most_clips: int) -> wire.Request:
        try:
            request = wire.read_request(body, max_rows=most_clips)
            for row in request.rows:
                if row.token_idx is not None and row.token_idx[-1] >= self.spec.num_tokens:
                    raise ValueError(
                        f"got token_idx up to {row.token_idx[-1]}, expected less than the teacher's"
                        f" {self.spec.num_tokens}"
                    )
        except wire.TooManyRowsError as error:
            raise too_large(
                "the request has too many clips", str(error), f"at most {most_clips} clips"
            ) from error
        except ValueError as error:
            hint = "the columns and their types are those of protocol version 1"
            raise ApiError(
                422, str(error), expected="a request for targets", got="a malformed one", hint=hint
            ) from error
        return request

    def _serialise(self, request: wire.Request, answer: Answer) -> wire.Body:
        header = wire.ResponseHeader(
            target_dtype=request.target_dtype,
            fingerprint=self.spec.fingerprint,
            compute=self.spec.compute,
            shape=(self.spec.num_tokens, self.spec.width),
            leased=answer.leased,
        )
        rows = [self._cut(asked, row) for asked, row in zip(request.rows, answer.rows, strict=True)]
        return wire.write_response(header, rows)

    def _cut(self, asked: wire.RequestRow, row: wire.ResponseRow) -> wire.ResponseRow:
        """The row with only the tokens that were asked for."""
        if asked.token_idx is None or row.encoded is None:
            return row
        encoded = codec.take_tokens(row.encoded, asked.token_idx, num_tokens=self.spec.num_tokens)
        return wire.ResponseRow(clip_digest=row.clip_digest, status=row.status, encoded=encoded)


def run_id(run: str) -> str:
    """A run's id, checked: it becomes a key and a label."""
    if _RUN_ID.fullmatch(run) is None:
        hint = f"the {Header.RUN} header, or the path of a progress report"
        raise ApiError(
            422,
            "the run's id is malformed",
            expected="1 to 64 of A-Z a-z 0-9 . _ -",
            got=run[:100],
            hint=hint,
        )
    return run
