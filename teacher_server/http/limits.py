"""How much of a request for targets is taken: its bytes, its clips and their rate; and for how long: until
its deadline, or its client leaves."""

import asyncio
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from salt_distill.common.protocol import Header
from salt_distill.teacher_server.board.board import Board
from salt_distill.teacher_server.http.access import Token
from salt_distill.teacher_server.http.errors import ApiError

T = TypeVar("T")


def least(own: int | None, everybodys: int) -> int:
    """A token's limit, which may only be tighter than everybody's."""
    return everybodys if own is None else min(own, everybodys)


def too_large(error: str, got: str, expected: str) -> ApiError:
    """A request of more bytes or clips than it may have."""
    return ApiError(413, error, expected=expected, got=got, hint="send fewer clips in a request")


def announced_bytes(request: Request, most_bytes: int) -> int:
    """The length of a body; one that is not announced may be the longest. Raises ApiError 413."""
    length = int(request.headers.get("content-length", most_bytes))
    if length > most_bytes:
        raise too_large("the body is too large", f"{length} bytes", f"at most {most_bytes} bytes")
    return length


async def read_body(request: Request, *, most_bytes: int, timeout_s: float) -> bytearray:
    """The body, whatever length it announced. Raises ApiError 408 or 413."""
    body = bytearray()
    chunks, late_s = request.stream(), asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            async with asyncio.timeout_at(late_s):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise ApiError(
                408,
                "the body arrives too slowly",
                expected=f"all of it within {timeout_s:g} s",
                got=f"{len(body)} bytes",
                hint="send fewer clips in a request",
                headers={"Connection": "close"},
            ) from error
        if chunk is None:
            return body
        body += chunk
        if len(body) > most_bytes:
            raise too_large("the body is too large", f"{len(body)} bytes", f"at most {most_bytes} bytes")


async def require_rate(board: Board, token: Token, num_clips: int) -> None:
    """Raises ApiError 429 where a token asks for more clips than it may."""
    if token.clips_per_s is None:
        return
    wait_s = await board.take(token.name, num_clips, token.clips_per_s)
    if wait_s:
        raise ApiError(
            429,
            f"the token of {token.name} asks too fast",
            expected=f"at most {token.clips_per_s:g} clips/s",
            got=f"{num_clips} clips more",
            hint="ask again after Retry-After",
            retry_after_s=math.ceil(1000 * wait_s) / 1000,
        )


def deadline_s(header: str | None) -> float | None:
    """The value of the deadline header as a time on the event loop's clock. Raises ApiError 422."""
    if header is None:
        return None
    if not header.isascii() or not header.isdigit() or len(header) > 12:
        hint = "the header says how long the client still waits"
        raise ApiError(
            422,
            f"{Header.DEADLINE_MS} is malformed",
            expected="whole milliseconds",
            got=header[:100],
            hint=hint,
        )
    return asyncio.get_running_loop().time() + int(header) / 1000


async def unless_left(request: Request, answering: Coroutine[Any, Any, T]) -> T:
    """The answer. Raises ClientDisconnect when the client leaves before; the answer then ends where it is."""
    answer, left = asyncio.create_task(answering), asyncio.create_task(_leaves(request))
    try:
        await asyncio.wait([answer, left], return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientDisconnect
    finally:
        answer.cancel()
        left.cancel()


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
