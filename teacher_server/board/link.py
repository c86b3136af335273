"""The board as a replica reaches it: an answer in time, or none."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from salt_distill.teacher_server.board.board import Board

_ANSWER_S = 2.0
"""Longest wait for the board."""
_AWAY_S = 2.0
"""How long it is left alone after it did not answer: no request waits for it meanwhile."""


class BoardAwayError(ConnectionError):
    """The board does not answer. What a target needs of it is done without."""


class BoardLink:
    """A ``Board`` whose methods raise BoardAwayError where it does not answer in time."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._away_until_s = float("-inf")

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        async def call(*values: Any, **named: Any) -> Any:
            if time.monotonic() < self._away_until_s:
                raise BoardAwayError("the board of this teacher does not answer")
            try:
                async with asyncio.timeout(_ANSWER_S):
                    return await getattr(self._board, method)(*values, **named)
            except (TimeoutError, ConnectionError) as error:
                self._away_until_s = time.monotonic() + _AWAY_S
                raise BoardAwayError(
                    f"the board of this teacher does not answer within {_ANSWER_S:g} s: {error}"
                ) from error

        return call
