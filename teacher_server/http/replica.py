"""The life of one replica: it loads, is ready, beats, drains, ends."""

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import cast

from fastapi import FastAPI

from salt_distill.common.config import ServiceConfig
from salt_distill.common.metrics import ServiceCounters, ServiceMetrics
from salt_distill.common.protocol import PROTOCOL, HttpStatus, TeacherFacts, TeacherLimits
from salt_distill.common.targets import codec
from salt_distill.teacher_server.board.board import Board, Ending
from salt_distill.teacher_server.board.link import BoardAwayError, BoardLink
from salt_distill.teacher_server.http.access import Tokens
from salt_distill.teacher_server.http.errors import ApiError
from salt_distill.teacher_server.http.front import RequestLog
from salt_distill.teacher_server.http.listener import Listener, Tls, only_peers
from salt_distill.teacher_server.sharing.batching import Batcher, FrozenTeacher, HangError
from salt_distill.teacher_server.sharing.disk import DiskTargets
from salt_distill.teacher_server.sharing.exchange import Answer, Exchange, RequestContext
from salt_distill.teacher_server.sharing.leases import Leases
from salt_distill.teacher_server.sharing.peers import Peers
from salt_distill.teacher_server.sharing.room import Room

logger = logging.getLogger(__name__)

_BEAT_S = 1.0
"""From one time that a replica says to the board that it lives, and hears whether the service ends, to the
next; and so with changed tokens."""


@dataclass(frozen=True, kw_only=True)
class ReplicaContext:
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
        context: ReplicaContext,
        disk: DiskTargets | None,
        tokens: Tokens | None = None,
        log: RequestLog | None = None,
    ) -> None:
        self.config, self._context, self._disk, self._tokens, self._log = config, context, disk, tokens, log
        self.spec = teacher.spec
        self.batch_size = int(self.spec.compute["batch_size"])
        self.batcher = Batcher(
            teacher,
            batch_size=self.batch_size,
            batch_wait_s=config.batch_wait_ms / 1000,
            memory_bytes=config.memory_bytes,
            disk=disk,
            forward_timeout_s=config.forward_timeout_s,
        )
        self.room = Room(config.max_pending_bytes, self.batcher.counters)
        self.leases = Leases(config.lease_s)
        self.board = cast(Board, BoardLink(context.board))
        self._name = f"{context.url}#{secrets.token_hex(4)}"  # a later process may get this one's port
        self.ending = Ending.NO
        self.open_requests = 0
        self.peers = Peers(body_timeout_s=config.body_timeout_s)
        self.exchange = Exchange(
            batcher=self.batcher,
            leases=self.leases,
            clip_shape=self.spec.clip_shape,
            target_shape=(self.spec.num_tokens, self.spec.width),
            board=self.board,
            replica=context.url,
            disk=disk,
            peers=self.peers,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.ready = False

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Serves between its two ends; readiness comes after the first forward, which does not delay
        liveness."""
        if self._log is not None:
            self._log.open()
        self.peers.secret = (
            await self._context.board.secret()
        )  # however long that takes: it is not ready before
        self._tasks = [
            asyncio.create_task(task) for task in (self.batcher.run(), self._warm_up(), self._watch_tokens())
        ]
        head_s, drain_s = self.config.header_timeout_s, self.config.drain_s
        if self._context.listener is not None:
            listener = Listener(only_peers(app), self._context.listener, header_timeout_s=head_s)
            self._tasks.append(asyncio.create_task(listener.serve()))
        front = None
        if self._context.front is not None:
            listening, tls = self._context.front
            front = Listener(app, listening, header_timeout_s=head_s, drain_s=drain_s, tls=tls)
            serving = asyncio.create_task(front.serve())
            self._tasks.append(serving)  # a clients' port that has ended is no readiness
        try:
            yield
        finally:
            if front is not None:
                front.drain()
                await asyncio.wait([serving])
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
            await self.peers.close()
            if self._context.url:
                with suppress(BoardAwayError):  # it takes a silent replica for lost by itself
                    await self.board.leave(self._context.url)
            if self._disk is not None:
                await asyncio.to_thread(self._disk.close)
            if self._log is not None:
                await asyncio.to_thread(self._log.close)

    def check(self) -> None:
        """Raises what ended the batcher or the first forward, if something did, and where the teacher
        hangs."""
        self.batcher.check()
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    def require_ready(self, *, passed_on: bool = False) -> None:
        """Raises ApiError before the first forward is done, where one hangs and when the service ends, and
        what ``check`` raises. ``passed_on``: what another replica passes on was begun there, and is answered
        while the service ends."""
        try:
            self.check()
        except HangError as error:
            raise ApiError(
                HttpStatus.NOT_READY,
                str(error),
                expected="a teacher that comes back from its forwards",
                got="one that hangs",
                hint="ask again after Retry-After: another replica takes its place",
                retry_after_s=self.config.retry_after_s,
            ) from error
        if self.ending and not (passed_on and self.ready):
            raise ApiError(
                HttpStatus.NOT_READY,
                "the teacher ends" if self.ending is Ending.STOP else "the teacher is drained",
                expected="a teacher that takes requests",
                got="one that only answers what it has begun",
                hint="ask again after Retry-After: another may take its place",
                retry_after_s=self.config.retry_after_s,
            )
        if not self.ready:
            raise ApiError(
                HttpStatus.NOT_READY,
                "the teacher is not ready",
                expected="a teacher that has done its first forward",
                got="one that starts",
                hint="ask again after Retry-After",
                retry_after_s=self.config.retry_after_s,
            )

    async def end(self, ending: Ending) -> None:
        """Ends this replica and, by the board, the others: nothing new is begun."""
        self.ending = max(self.ending, ending)
        await self.board.end(ending)

    async def _warm_up(self) -> None:
        await self.batcher.warm_up()
        while True:
            try:
                await self._beat()
            except BoardAwayError as error:
                logger.warning("%s; targets are computed without it", error)
            self.ready = True
            await asyncio.sleep(_BEAT_S)

    async def _beat(self) -> None:
        """Says that this replica lives, until the board knows what it does."""
        if self._context.url and not await self.board.knows(self._context.url):
            await self.board.join(self._context.url, self.batcher.memory.clip_digests())
        before, self.ending = (
            self.ending,
            Ending(await self.board.served(self._name, self.metrics(), ending=self.ending)),
        )
        if self.ending != before:
            logger.info("the service ends: no new requests for targets")
            await self.board.served(self._name, self.metrics(), ending=self.ending)

    async def _watch_tokens(self) -> None:
        while self._tokens is not None:
            await asyncio.sleep(_BEAT_S)
            await asyncio.to_thread(self._tokens.reload)

    async def facts(self) -> TeacherFacts:
        """``GET /v1/teacher``."""
        try:
            metrics = await self.all_metrics()
        except BoardAwayError:  # of this replica then: a student need not wait for the board
            metrics = self.metrics()
        return TeacherFacts(
            **asdict(self.spec),
            protocol=PROTOCOL,
            dtypes=codec.TARGET_DTYPES,
            batch_size=self.batch_size,
            buckets=self._context.buckets,
            ingress=self._context.ingress,
            limits=TeacherLimits(
                max_request_bytes=self.config.max_request_bytes,
                max_request_clips=self.config.max_request_clips,
                lease_s=self.config.lease_s,
            ),
            ready=self.ready,
            ending=self.ending.word,
            counters=ServiceCounters(
                **{name: getattr(metrics, name) for name in ServiceCounters.model_fields}
            ),
        )

    async def all_metrics(self) -> ServiceMetrics:
        """The sums over all replicas; this one's as they are now, the others' as they were when they answered
        last. Raises BoardAwayError."""
        await self.board.served(self._name, self.metrics(), ending=self.ending)
        total = await self.board.metrics()
        total.batch_fill = total.clips_computed / max(1, total.forwards * self.batch_size)
        return total

    def metrics(self) -> ServiceMetrics:
        """What this replica has done, and what it holds now."""
        metrics = self.batcher.counters.model_copy(deep=True)
        metrics.memory_clips = len(self.batcher.memory)
        metrics.memory_bytes = self.batcher.memory.num_bytes
        metrics.leases = len(self.leases)
        metrics.queued_clips = self.batcher.queued_clips
        metrics.open_requests = self.open_requests
        metrics.draining = int(self.ending > 0)
        if self._disk is not None:
            metrics.disk_clips = len(self._disk)
            metrics.disk_not_written, metrics.disk_not_read = self._disk.not_written, self._disk.not_read
            metrics.disk_corrupt = self._disk.corrupt
        return metrics

    def count_answer(self, context: RequestContext, answer: Answer, num_bytes: int) -> asyncio.Task[None]:
        """Counts an answer of so many bytes, here and on the board; done when the board knows, or is away.
        What is passed on is counted where it arrived."""
        sent_bytes = 0 if context.is_passed_on else num_bytes
        self.batcher.counters.bytes_out += sent_bytes
        clips = 0 if context.is_passed_on else sum(row.status == "ok" for row in answer.rows)
        return asyncio.create_task(self._tell_board(context, clips, answer, sent_bytes))

    async def _tell_board(self, context: RequestContext, clips: int, answer: Answer, num_bytes: int) -> None:
        with suppress(BoardAwayError):
            await self.board.served(
                self._name,
                self.metrics(),
                context.share.run,
                token=context.share.token or "",
                clips=clips,
                computed=answer.num_computed,
                shared=answer.num_shared,
                num_bytes=num_bytes,
            )
