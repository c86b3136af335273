"""An answer as the pieces that it is made of."""

import asyncio
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from salt_distill.common.protocol import ARROW_TYPE
from salt_distill.common.targets import wire


class InPieces(Response):
    """An answer whose targets are sent from where they are in memory, without a copy."""

    def __init__(self, body: wire.Body, before_the_last: asyncio.Future[Any]) -> None:
        """``before_the_last``: ends before the last piece leaves. So who has the answer finds it counted, and
        no piece waits for the board."""
        super().__init__(headers={"Content-Length": str(sum(map(len, body)))}, media_type=ARROW_TYPE)
        self._body, self._before_the_last = body, before_the_last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        *pieces, last = self._body
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._before_the_last
        await send({"type": "http.response.body", "body": last})
