"""A request as it comes in, of whichever route: whose it is, its type, its body within its bounds."""

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from salt_distill.common.protocol import ID_PATTERN, Header, HttpStatus
from salt_distill.teacher_server.http.access import ANYONE, Token
from salt_distill.teacher_server.http.errors import ApiError
from salt_distill.teacher_server.sharing.room import Share

T = TypeVar("T")

_RUN_ID = re.compile(rf"(?!\.{{1,2}}$){ID_PATTERN[1:-1]}")


def run_id(run: str) -> str:
    """A run's id, checked: it becomes a key and a label."""
    if _RUN_ID.fullmatch(run) is None:
        raise ApiError(
            HttpStatus.MALFORMED,
            "the run's id is malformed",
            expected="1 to 64 of A-Z a-z 0-9 . _ -",
            got=run[:100],
            hint=f"the {Header.RUN} header, or the path of a progress report",
        )
    return run


def share_of(token: Token, run: str) -> Share:
    """Whose share of the service a request of a client counts to."""
    return Share(None if token is ANYONE else token.name, run)


def require_type(request: Request, expected: str, *, hint: str) -> None:
    """Raises ApiError unless the body says to be of a type. No form of a web page can send one of ours."""
    content_type = request.headers.get("content-type", "")
    if content_type.split(";")[0].strip().lower() != expected:
        raise ApiError(
            HttpStatus.WRONG_TYPE,
            f"the body is not {expected}",
            expected=expected,
            got=content_type[:100] or "no Content-Type",
            hint=hint,
        )


def announced_bytes(request: Request, max_bytes: int) -> int:
    """The length of a body; one that is not announced may be the longest. Raises ApiError."""
    length = int(request.headers.get("content-length", max_bytes))
    if length > max_bytes:
        raise too_large("the body is too large", f"{length} bytes", f"at most {max_bytes} bytes")
    return length


async def read_body(
    request: Request, *, max_bytes: int, timeout_s: float, take: Callable[[int], None]
) -> bytearray:
    """The body, whatever length it announced; ``take`` counts what comes. Raises ApiError."""
    body = bytearray()
    chunks, late_s = request.stream(), asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            async with asyncio.timeout_at(late_s):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise ApiError(
                HttpStatus.TOO_SLOW,
                "the body arrives too slowly",
                expected=f"all of it within {timeout_s:g} s",
                got=f"{len(body)} bytes",
                hint="send less in a request",
                headers={"Connection": "close"},
            ) from error
        if chunk is None:
            return body
        if len(body) + len(chunk) > max_bytes:
            raise too_large(
                "the body is too large", f"{len(body) + len(chunk)} bytes", f"at most {max_bytes} bytes"
            )
        take(len(chunk))
        body += chunk


async def unless_left(request: Request, answering: Coroutine[Any, Any, T]) -> T:
    """The answer. Raises ClientDisconnect when the client leaves before; the answer then ends where it is."""
    answer, leaving = asyncio.create_task(answering), asyncio.create_task(_leaves(request))
    try:
        await asyncio.wait([answer, leaving], return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientDisconnect
    finally:
        answer.cancel()
        leaving.cancel()


def too_large(error: str, got: str, expected: str) -> ApiError:
    """A request of more bytes or clips than it may have."""
    return ApiError(HttpStatus.TOO_LARGE, error, expected=expected, got=got, hint="send less in a request")


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
