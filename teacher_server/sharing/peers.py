"""Replicas among themselves: rows passed on to the one that owns their clips, over kept-alive connections."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Sequence

import aiohttp

from salt_distill.common.config import TargetDtype
from salt_distill.common.protocol import ARROW_TYPE, Header, HttpStatus, Route
from salt_distill.common.targets import wire
from salt_distill.teacher_server.sharing.room import BusyError

_CONNECT_S, _KEPT_ALIVE_S = 5.0, 5.0
"""Until a replica takes a connection; and how long one is kept for the next request, less than the other
side's ``header_timeout_s``."""


class PeerLostError(ConnectionError):
    """A replica that owns clips does not answer."""


class Peers:
    """The replicas of one teacher, as one of them reaches the others."""

    def __init__(self, *, body_timeout_s: float) -> None:
        """``body_timeout_s``: how long an answer may take to arrive, once it begins."""
        self._body_timeout_s = body_timeout_s
        self.secret: str | None = None
        """What they know of each other, and nobody else; None before it is there."""
        self._session: aiohttp.ClientSession | None = None

    def is_one(self, presented: str) -> bool:
        """Whether a request that shows a secret comes from a replica."""
        return self.secret is not None and hmac.compare_digest(self.secret.encode(), presented.encode())

    async def ask(
        self,
        url: str,
        dtype: TargetDtype,
        rows: Sequence[wire.RequestRow],
        headers: dict[str, str],
        *,
        max_bytes: int,
        take: Callable[[int], None],
    ) -> tuple[wire.ResponseHeader, list[wire.ResponseRow]]:
        """The rows of a replica's answer, of at most ``max_bytes``, in order; ``take`` counts its bytes
        as they come. Cancelled, it closes its connection, and the other one sees that nobody waits any more.

        Raises BusyError, as ``take`` may, and PeerLostError where the replica is not there or answers
        otherwise.
        """
        body = await asyncio.to_thread(wire.write_request, dtype, rows)
        head = {
            "Content-Type": ARROW_TYPE,
            "Content-Length": str(sum(map(len, body))),
            Header.PASSED: self.secret or "",
            **headers,
        }
        try:
            async with self._open().post(url + Route.TARGETS, data=_pieces(body), headers=head) as answer:
                async with asyncio.timeout(self._body_timeout_s):
                    content = await _read(answer, max_bytes, take)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PeerLostError(f"replica {url}: {type(error).__name__}: {error}") from error
        if len(content) > max_bytes:
            raise PeerLostError(f"replica {url} answered with more than {max_bytes} bytes")
        if answer.status == HttpStatus.BUSY:
            raise BusyError(f"the replica that owns these clips, {url}, is busy")
        if answer.status != 200:
            raise PeerLostError(f"replica {url} answered {answer.status}: {content[:200]!r}")
        try:
            return await asyncio.to_thread(wire.read_response, content)
        except ValueError as error:
            raise PeerLostError(f"replica {url} answered with damaged bytes: {error}") from error

    async def close(self) -> None:
        """Ends the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # here, since it belongs to the event loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                auto_decompress=False,
            )
        return self._session


async def _read(answer: aiohttp.ClientResponse, max_bytes: int, take: Callable[[int], None]) -> bytearray:
    """The body, or of a longer one a byte more than ``max_bytes``: its connection is then closed."""
    content = bytearray()
    while len(content) <= max_bytes and (piece := await answer.content.read(max_bytes + 1 - len(content))):
        take(len(piece))
        content += piece
    if len(content) > max_bytes:
        answer.close()
    return content


async def _pieces(body: wire.Body) -> AsyncIterator[bytes]:
    for piece in body:
        yield bytes(piece) if isinstance(piece, bytearray) else piece  # pyright: ignore[reportReturnType]
