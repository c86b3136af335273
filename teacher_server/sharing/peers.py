"""Replicas among themselves: rows passed on to the one that owns their clips, over plain HTTP."""

import asyncio
import hmac
import math
import urllib.parse
from collections.abc import Sequence

from salt_distill.common.config import TargetDtype
from salt_distill.common.protocol import ARROW_TYPE, Header, Route
from salt_distill.common.targets import wire
from salt_distill.teacher_server.sharing.batching import BusyError


class PeerSecret:
    """What the replicas of one teacher know of each other, and nobody else. None matches before it is
    there."""

    value: str | None = None

    def is_it(self, presented: str) -> bool:
        """Whether a request comes from a replica."""
        return self.value is not None and hmac.compare_digest(self.value.encode(), presented.encode())


class PeerLostError(ConnectionError):
    """A replica that owns clips does not answer."""


async def ask(
    url: str, secret: str, dtype: TargetDtype, rows: Sequence[wire.RequestRow], headers: dict[str, str]
) -> tuple[wire.ResponseHeader, list[wire.ResponseRow]]:
    """The rows of a peer's answer, in order. Cancelled, it closes its connection, and the peer sees that
    nobody waits any more.

    Raises BusyError, and PeerLostError where the peer is not there or answers otherwise.
    """
    body = await asyncio.to_thread(wire.write_request, dtype, rows)
    parts = urllib.parse.urlsplit(url)
    head = {
        "Host": parts.netloc,
        "Connection": "close",
        "Content-Type": ARROW_TYPE,
        "Content-Length": str(sum(map(len, body))),
        Header.PASSED: secret,
        **headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(f"POST {Route.TARGETS} HTTP/1.1\r\n{lines}\r\n".encode())
            for piece in body:
                writer.write(piece)
            await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
            status = int(answer.split(None, 2)[1])
            content = await reader.read()
        finally:
            writer.close()
    except (OSError, EOFError, asyncio.LimitOverrunError) as error:
        raise PeerLostError(f"replica {url}: {type(error).__name__}: {error}") from error
    if status == 429:
        raise BusyError(f"the replica that owns these clips, {url}, is busy")
    if status != 200:
        raise PeerLostError(f"replica {url} answered {status}: {content[:200]!r}")
    try:
        return await asyncio.to_thread(wire.read_response, content)
    except ValueError as error:
        raise PeerLostError(f"replica {url} answered with damaged bytes: {error}") from error


def deadline_ms(deadline_s: float) -> str:
    """What is left until a time on the event loop's clock, as the header says it."""
    return str(max(1, math.ceil((deadline_s - asyncio.get_running_loop().time()) * 1000)))
