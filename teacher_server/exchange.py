"""The rows of one request against what the service has, computes and waits for: memory, flights, leases."""

import asyncio
from dataclasses import dataclass

import numpy as np

from common.clip import clip_digest
from common.config import TargetDtype
from common.targets.codec import EncodedTarget
from common.targets.wire import Request, RequestRow, ResponseRow, Status
from teacher_server.batching import Batcher
from teacher_server.leases import LeaseEnd, Leases


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row for each row of a request, in its order."""

    rows: list[ResponseRow]
    leased: tuple[int, ...]
    """Rows whose need_clip means: the clip is on its way, ask again without bytes."""


class Exchange:
    """Answers requests.

    Note [leases]: a row without bytes asks for a clip. In memory: it is answered. On its way, or leased to another asker: it waits.
    Unknown: this request gets the lease, and from then on waits for no other asker, since that one may be waiting for this one's clips:
    its other rows are answered ``need_clip`` too, and named in ``leased``. So two clients never wait for each other. A client that
    uploads the leased rows as well is only slower. A lease that ends without bytes goes to the one who waits longest.
    """

    def __init__(self, batcher: Batcher, leases: Leases, clip_shape: tuple[int, int, int, int]) -> None:
        self._batcher, self._leases, self._clip_shape = batcher, leases, clip_shape

    async def answer(self, request: Request, run: str) -> Answer:
        """The answer, when the rows with bytes are computed, and the others too unless the client is to upload some."""
        refused = await asyncio.to_thread(self._refusals, request.rows)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        outcomes = await asyncio.gather(
            *(
                _refused(status)
                if status is not None
                else self._ask(row, request.target_dtype, granted)
                if row.clip is None
                else self._bring(row, request.target_dtype, run)
                for row, status in zip(request.rows, refused, strict=True)
            )
        )
        rows = [
            ResponseRow(clip_digest=row.clip_digest, status=outcome.status, encoded=outcome.encoded)
            for row, outcome in zip(request.rows, outcomes, strict=True)
        ]
        counters = self._batcher.counters
        counters.clips_served += sum(outcome.status == "ok" for outcome in outcomes)
        counters.need_clip += sum(outcome.status == "need_clip" for outcome in outcomes)
        counters.refused += sum(status is not None for status in refused)
        return Answer(rows=rows, leased=tuple(number for number, outcome in enumerate(outcomes) if outcome.leased))

    def _refusals(self, rows: list[RequestRow]) -> list[Status | None]:
        """What is wrong with each row's bytes, if anything. Hashes, so not for the event loop."""
        return [self._refusal(row) for row in rows]

    def _refusal(self, row: RequestRow) -> Status | None:
        if row.clip is None:
            return None
        if memoryview(row.clip).nbytes != np.prod(self._clip_shape):
            return "bad_shape"
        clip = np.frombuffer(memoryview(row.clip), dtype=np.uint8).reshape(self._clip_shape)
        return None if clip_digest(clip) == row.clip_digest else "bad_digest"

    async def _bring(self, row: RequestRow, dtype: TargetDtype, run: str) -> "_Outcome":
        """The target of a row with bytes."""
        assert row.clip is not None
        if (encoded := self._remember(row, dtype)) is not None:
            return _Outcome("ok", encoded)
        flight = self._batcher.flight(row.clip_digest)
        if flight is None:
            flight = self._batcher.submit(row.clip_digest, row.clip, run)
            self._leases.fulfil(row.clip_digest)
        else:
            self._batcher.counters.coalesced += 1
        return _Outcome("ok", await asyncio.shield(flight.result(dtype)))

    async def _ask(self, row: RequestRow, dtype: TargetDtype, granted: "asyncio.Future[None]") -> "_Outcome":
        """The target of a row without bytes, or need_clip. See Note [leases]."""
        while True:
            if (encoded := self._remember(row, dtype)) is not None:
                return _Outcome("ok", encoded)
            flight = self._batcher.flight(row.clip_digest)
            if flight is not None:
                result = flight.result(dtype)
                await asyncio.wait([result, granted], return_when=asyncio.FIRST_COMPLETED)
                if not result.done():
                    return _Outcome("need_clip", leased=True)
                self._batcher.counters.coalesced += 1
                return _Outcome("ok", result.result())
            end = await self._lease_end(row.clip_digest, granted)
            if end is None:
                return _Outcome("need_clip", leased=True)
            if end is LeaseEnd.YOURS:
                if not granted.done():
                    granted.set_result(None)
                return _Outcome("need_clip")

    async def _lease_end(self, digest: bytes, granted: "asyncio.Future[None]") -> LeaseEnd | None:
        """How the wait for a clip's lease ends; None if this request is to upload other clips first."""
        if digest not in self._leases:
            self._leases.grant(digest)
            return LeaseEnd.YOURS
        waiter = self._leases.wait(digest)
        try:
            await asyncio.wait([waiter, granted], return_when=asyncio.FIRST_COMPLETED)
            return waiter.result() if waiter.done() else None
        finally:
            waiter.cancel()  # whoever left is not given the lease

    def _remember(self, row: RequestRow, dtype: TargetDtype) -> EncodedTarget | None:
        encoded = self._batcher.memory.get(row.clip_digest, dtype)
        if encoded is not None:
            self._batcher.counters.from_memory += 1
        return encoded


@dataclass(frozen=True)
class _Outcome:
    status: Status
    encoded: EncodedTarget | None = None
    leased: bool = False


async def _refused(status: Status) -> _Outcome:
    return _Outcome(status)
