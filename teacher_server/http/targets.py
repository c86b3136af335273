"""``POST /v1/targets``, from the head of a request to the last byte of its answer."""

import asyncio
import math
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from typing_extensions import Buffer

from salt_distill.common.protocol import ARROW_TYPE, Header, HttpStatus
from salt_distill.common.targets import codec, wire
from salt_distill.common.targets.codec import EncodedTarget
from salt_distill.teacher_server.board.link import BoardAwayError
from salt_distill.teacher_server.http.access import PEER, Token
from salt_distill.teacher_server.http.errors import ApiError
from salt_distill.teacher_server.http.front import RequestRecord
from salt_distill.teacher_server.http.incoming import (
    announced_bytes,
    read_body,
    require_type,
    run_id,
    share_of,
    too_large,
    unless_left,
)
from salt_distill.teacher_server.http.listener import ABORT
from salt_distill.teacher_server.http.replica import TeacherService
from salt_distill.teacher_server.sharing.exchange import Answer, RequestContext
from salt_distill.teacher_server.sharing.room import BusyError, HeldBytes, HeldTargets, Share

_SENT_TOGETHER_BYTES = 1 << 16
"""Pieces smaller than this leave together."""


class TargetsRoute:
    """The route of one replica."""

    def __init__(self, service: TeacherService) -> None:
        self._service, self._config, self._spec = service, service.config, service.spec
        self._room, self._counters = service.room, service.batcher.counters

    async def __call__(self, request: Request) -> Response:
        """The answer."""
        record: RequestRecord = request.state.record
        context = _context(request, record.token)
        record.run = context.share.run
        record.token.require_run(context.share.run)
        self._check_headers(request, record.token)
        held = self._room.enter(context.share)
        context = replace(context, held=held)
        deadline = asyncio.timeout_at(context.deadline_s)
        try:
            async with deadline:
                return await self._answer(request, context, held)
        except BusyError as error:
            raise ApiError(
                HttpStatus.BUSY,
                str(error),
                expected=f"at most {self._config.max_pending_bytes} bytes",
                got="a request for more",
                hint="ask again after Retry-After",
                retry_after_s=self._config.retry_after_s,
            ) from error
        except TimeoutError as error:
            if not deadline.expired():
                raise
            self._counters.expired += 1
            raise ApiError(
                HttpStatus.EXPIRED,
                "the request's deadline has passed",
                expected=f"an answer within {Header.DEADLINE_MS}",
                got=f"{request.headers[Header.DEADLINE_MS]} ms that were too short",
                hint="ask again: what was computed meanwhile is in memory",
            ) from error
        finally:
            held.release()

    async def _answer(self, request: Request, context: RequestContext, held: HeldBytes) -> Response:
        record: RequestRecord = request.state.record
        max_bytes = _tighter(record.token.max_request_bytes, self._config.max_request_bytes)
        max_clips = _tighter(record.token.max_request_clips, self._config.max_request_clips)
        held.require(announced_bytes(request, max_bytes))
        body = await read_body(
            request, max_bytes=max_bytes, timeout_s=self._config.body_timeout_s, take=held.take
        )
        parsed, copied_bytes = await asyncio.to_thread(self._parse, body, max_clips)
        record.asks([row.clip_digest for row in parsed.rows], len(body))
        await self._require_rate(record.token, len(parsed.rows))
        if not context.is_passed_on:  # counted where it arrived
            self._counters.requests += 1
            self._counters.bytes_in += len(body)
        answer = await unless_left(request, self._service.exchange.answer(parsed, context))
        asked = [replace(row, clip=None) for row in parsed.rows]
        held.give_back(len(body))
        del parsed, body  # the targets are what is held from here on
        held_targets: list[HeldTargets] = []  # here, since what a cancelled task returns is lost

        async def hold() -> None:
            held_targets.append(
                await self._room.hold_targets(
                    context.share,
                    [row.encoded for row in answer.rows if row.encoded is not None],
                    copied_bytes=copied_bytes,
                    timeout_s=self._config.body_timeout_s,
                )
            )

        try:
            await unless_left(request, hold())
            held.release()  # what other replicas answered is among the targets now
            started = time.perf_counter()
            pieces = await asyncio.to_thread(self._serialise, asked, answer)
            self._counters.serialise.observe(time.perf_counter() - started)
            num_bytes = sum(map(len, pieces))
            record.num_computed, record.bytes_out = answer.num_computed, num_bytes
            told = self._service.count_answer(context, answer, num_bytes)
            return AnswerInPieces(
                pieces, held_targets[0], timeout_s=self._config.body_timeout_s, before_the_last=told
            )
        except BaseException:
            for targets in held_targets:
                targets.release()
            raise

    def _check_headers(self, request: Request, token: Token) -> None:
        """Raises ApiError where the request cannot be answered whatever its body is."""
        self._service.require_ready(passed_on=token is PEER)
        fingerprint = request.headers.get(Header.TEACHER, self._spec.fingerprint)
        if fingerprint != self._spec.fingerprint:
            raise ApiError(
                HttpStatus.OTHER_TEACHER,
                "another teacher is served here",
                expected=fingerprint,
                got=self._spec.fingerprint,
                hint="this URL serves another teacher: correct the URL, or start a new run",
            )
        require_type(request, ARROW_TYPE, hint="send an Arrow IPC stream")

    def _parse(self, body: bytearray, max_clips: int) -> tuple[wire.Request, int]:
        """The request, and how many bytes its answer copies."""
        try:
            parsed = wire.read_request(body, max_rows=max_clips, num_tokens=self._spec.num_tokens)
        except wire.TooManyRowsError as error:
            raise too_large(
                "the request has too many clips", str(error), f"at most {max_clips} clips"
            ) from error
        except ValueError as error:
            raise ApiError(
                HttpStatus.MALFORMED,
                str(error),
                expected="a request for targets",
                got="a malformed one",
                hint="the columns and their types are those of protocol version 1",
            ) from error
        return parsed, self._copied_bytes(parsed)

    async def _require_rate(self, token: Token, num_clips: int) -> None:
        """Raises ApiError where a token asks for more clips than it may. While the board is away nobody
        counts them."""
        if token.clips_per_s is None:
            return
        try:
            wait_s = await self._service.board.take(token.name, num_clips, token.clips_per_s)
        except BoardAwayError:
            return
        if wait_s:
            raise ApiError(
                HttpStatus.BUSY,
                f"the token of {token.name} asks too fast",
                expected=f"at most {token.clips_per_s:g} clips/s",
                got=f"{num_clips} clips more",
                hint="ask again after Retry-After",
                retry_after_s=math.ceil(1000 * wait_s) / 1000,
            )

    def _copied_bytes(self, request: wire.Request) -> int:
        """Of the rows that are cut. Raises ApiError where it is more than there is room for."""
        num_tokens = {
            (row.clip_digest, row.token_idx.tobytes()): len(row.token_idx)
            for row in request.rows
            if row.token_idx is not None
        }
        whole = codec.num_bytes(request.target_dtype, self._spec.num_tokens, self._spec.width)
        copied = sum(num_tokens.values()) * whole // self._spec.num_tokens
        if copied > self._config.max_pending_bytes:
            raise too_large(
                "the answer is too large",
                f"{copied} bytes of tokens",
                f"at most {self._config.max_pending_bytes} bytes",
            )
        return copied

    def _serialise(self, asked: Sequence[wire.RequestRow], answer: Answer) -> wire.Body:
        """The bytes, with of each row only the tokens that were asked for. Here alone rows are cut: between
        replicas they travel whole."""
        header = wire.ResponseHeader(
            target_dtype=answer.target_dtype,
            fingerprint=self._spec.fingerprint,
            compute=self._spec.compute,
            shape=(self._spec.num_tokens, self._spec.width),
            leased=answer.leased,
        )
        cuts: dict[tuple[bytes, bytes], EncodedTarget] = {}
        rows = []
        for request_row, row in zip(asked, answer.rows, strict=True):
            if request_row.token_idx is not None and row.encoded is not None:
                key = row.clip_digest, request_row.token_idx.tobytes()
                if key not in cuts:  # equal rows are one
                    cuts[key] = codec.take_tokens(
                        row.encoded, request_row.token_idx, num_tokens=self._spec.num_tokens
                    )
                row = replace(row, encoded=cuts[key])
            rows.append(row)
        return wire.write_response(header, rows)


class AnswerInPieces(Response):
    """An answer whose targets are sent from where they are in memory, without a copy, and counted until they
    are sent."""

    def __init__(
        self,
        pieces: wire.Body,
        targets: HeldTargets,
        *,
        timeout_s: float,
        before_the_last: asyncio.Future[None],
    ) -> None:
        """``timeout_s``: how long it may take to leave. ``before_the_last``: ends before the last piece
        leaves. So who has the answer finds it counted, and no piece waits for the board."""
        super().__init__(headers={"Content-Length": str(sum(map(len, pieces)))}, media_type=ARROW_TYPE)
        self._pieces, self._targets = pieces, targets
        self._timeout_s, self._before_the_last = timeout_s, before_the_last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                for piece, is_last in _together(self._pieces):
                    if is_last:
                        await self._before_the_last
                    await send({"type": "http.response.body", "body": piece, "more_body": not is_last})
        except TimeoutError:  # its client reads too slowly, or not at all
            if ABORT in scope.get("extensions", {}):
                scope["extensions"][ABORT]()
                while (await receive())["type"] != "http.disconnect":
                    continue  # else the server ends the connection of an answer that is not whole
        finally:
            self._targets.release()


def _together(pieces: wire.Body) -> Iterator[tuple[Buffer, bool]]:
    """The pieces, small ones joined when their turn comes, and whether each is the last one."""
    joined = bytearray()
    for number, piece in enumerate(pieces, 1):
        is_last = number == len(pieces)
        if len(piece) < _SENT_TOGETHER_BYTES:
            joined += piece
            if is_last or len(joined) >= _SENT_TOGETHER_BYTES:
                yield joined, is_last
                joined = bytearray()
            continue
        if joined:
            yield joined, False
            joined = bytearray()
        yield piece, is_last


def _tighter(of_token: int | None, of_service: int) -> int:
    """A token's limit, which may only be tighter than everybody's."""
    return of_service if of_token is None else min(of_token, of_service)


def _context(request: Request, token: Token) -> RequestContext:
    """Who asks, as the head of the request says."""
    run = run_id(request.headers.get(Header.RUN, "unnamed"))
    share = share_of(token, run)
    if token is PEER:
        name = request.headers.get(Header.SHARE)
        share = Share(None if name is None else urllib.parse.unquote(name), run)
    record: RequestRecord = request.state.record
    return RequestContext(
        share=share,
        request=record.request,
        is_passed_on=token is PEER,
        deadline_s=_deadline_s(request.headers.get(Header.DEADLINE_MS)),
    )


def _deadline_s(header: str | None) -> float | None:
    """The value of the deadline header as a time on the event loop's clock. Raises ApiError."""
    if header is None:
        return None
    if not header.isascii() or not header.isdigit() or len(header) > 12:
        raise ApiError(
            HttpStatus.MALFORMED,
            f"{Header.DEADLINE_MS} is malformed",
            expected="whole milliseconds",
            got=header[:100],
            hint="the header says how long the client still waits",
        )
    return asyncio.get_running_loop().time() + int(header) / 1000
