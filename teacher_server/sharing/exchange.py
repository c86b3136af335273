"""The rows of one request against what the service has, computes and waits for: memory, disk, clips on their
way, leases, other replicas."""

import asyncio
import logging
import math
import urllib.parse
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from salt_distill.common.clip import clip_digest
from salt_distill.common.config import TargetDtype
from salt_distill.common.protocol import Header, RowStatus
from salt_distill.common.targets import codec, wire
from salt_distill.common.targets.codec import EncodedTarget
from salt_distill.common.targets.wire import Request, RequestRow, ResponseRow
from salt_distill.teacher_server.board.board import Board
from salt_distill.teacher_server.board.link import BoardAwayError
from salt_distill.teacher_server.sharing.batching import Batcher
from salt_distill.teacher_server.sharing.disk import DiskTargets
from salt_distill.teacher_server.sharing.leases import LeaseEnd, Leases
from salt_distill.teacher_server.sharing.origins import Origins
from salt_distill.teacher_server.sharing.peers import PeerLostError, Peers
from salt_distill.teacher_server.sharing.room import HeldBytes, Share

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """Who sends a request."""

    share: Share
    """Whose clips and bytes it is."""
    request: str
    """The request's id."""
    is_passed_on: bool = False
    """Another replica passes it on, since the rows are this one's."""
    held: HeldBytes | None = None
    """What counts the bytes that other replicas answer; None: nobody."""
    deadline_s: float | None = None
    """When nobody reads the answer any more, on the event loop's clock."""

    def take(self, num_bytes: int) -> None:
        """Counts bytes that another replica answers. Raises BusyError where there is no room for them."""
        if self.held is not None:
            self.held.take(num_bytes)

    def headers(self) -> dict[str, str]:
        """Said to the replica that rows are passed on to."""
        headers: dict[str, str] = {Header.RUN: self.share.run, Header.REQUEST: self.request}
        if self.share.token is not None:
            headers[Header.SHARE] = urllib.parse.quote(self.share.token)
        if self.deadline_s is not None:
            left_s = self.deadline_s - asyncio.get_running_loop().time()
            headers[Header.DEADLINE_MS] = str(max(1, math.ceil(1000 * left_s)))
        return headers


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row for each row of a request, in its order."""

    target_dtype: TargetDtype
    rows: list[ResponseRow]
    """Each target whole, whatever tokens were asked for."""
    leased: tuple[int, ...]
    """Rows whose need_clip means: the clip is on its way, ask again without bytes."""
    num_computed: int
    """Rows that caused a forward here."""
    num_shared: int
    """Rows answered here from work that another run had asked for."""


@dataclass
class _Ask:
    """One request while it is answered."""

    dtype: TargetDtype
    context: RequestContext
    granted: "asyncio.Future[None]"
    """Done when this request is to upload clips, and so waits for no other asker. See Note [leases]."""
    on_disk: dict[bytes, EncodedTarget]
    """What the disk has of it."""
    num_computed: int = 0
    num_shared: int = 0

    def grant(self) -> None:
        if not self.granted.done():
            self.granted.set_result(None)


@dataclass(frozen=True)
class _Outcome:
    status: RowStatus
    encoded: EncodedTarget | None = None
    leased: bool = False


_LEASED = _Outcome("need_clip", leased=True)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Answers requests.

    Note [leases]: a row without bytes asks for a clip. In memory: it is answered. On its way, or leased to
    another asker: it waits. Unknown: this request gets the lease, and from then on waits for no other asker,
    since that one may be waiting for this one's clips: its other rows are answered ``need_clip`` too, and
    named in ``leased``. So two clients never wait for each other. A client that uploads the leased rows as
    well is only slower. A lease that ends without bytes goes to the one who waits longest.

    Note [owners]: with several replicas each clip has one owner, the replica that was asked for it first, as
    the board knows. Rows of another owner are passed on to it, bytes or not, so leases, coalescing and memory
    are what they are with one replica, wherever a request arrives. That it arrives at the owner, nearly
    always, is the work of the bucket header. An owner that does not answer has lost its clips: the asker
    claims them.
    """

    batcher: Batcher
    leases: Leases
    clip_shape: tuple[int, int, int, int]
    target_shape: tuple[int, int]
    """Tokens and their width."""
    board: Board
    peers: Peers
    """The other replicas."""
    replica: str = ""
    """The URL at which other replicas reach this one; empty where there are none."""
    disk: DiskTargets | None = None
    origins: Origins = field(default_factory=Origins)

    async def answer(self, request: Request, context: RequestContext) -> Answer:
        """The answer, when the rows with bytes are computed, and the others too unless the client is to
        upload some."""
        refused = await asyncio.to_thread(self._refusals, request.rows)
        asked = [row for row, status in zip(request.rows, refused, strict=True) if status is None]
        ask = _Ask(
            request.target_dtype,
            context,
            asyncio.get_running_loop().create_future(),
            await self._on_disk(request, asked),
        )
        good = iter(await self._answer_rows(asked, ask))
        outcomes = [next(good) if status is None else _Outcome(status) for status in refused]
        rows = [
            ResponseRow(clip_digest=row.clip_digest, status=outcome.status, encoded=outcome.encoded)
            for row, outcome in zip(request.rows, outcomes, strict=True)
        ]
        self.batcher.counters.refused += sum(status is not None for status in refused)
        leased = tuple(number for number, outcome in enumerate(outcomes) if outcome.leased)
        return Answer(
            target_dtype=request.target_dtype,
            rows=rows,
            leased=leased,
            num_computed=ask.num_computed,
            num_shared=ask.num_shared,
        )

    async def _answer_rows(self, rows: list[RequestRow], ask: _Ask) -> list[_Outcome]:
        """Each row's outcome. Rows go to their owners at once, those without bytes apart, since they may have
        to wait for an upload."""
        parts: dict[tuple[str, bool], list[int]] = {}
        for number, owner in enumerate(await self._owners(rows, ask)):
            parts.setdefault((owner, rows[number].clip is None), []).append(number)
        outcomes: dict[int, _Outcome] = {}
        answers = await _all(
            self._answer_own([rows[number] for number in numbers], ask)
            if owner == self.replica
            else self._pass_on(owner, [rows[number] for number in numbers], ask)
            for (owner, _), numbers in parts.items()
        )
        for numbers, answer in zip(parts.values(), answers, strict=True):
            outcomes.update(zip(numbers, answer, strict=True))
        return [outcomes[number] for number in range(len(rows))]

    async def _owners(self, rows: list[RequestRow], ask: _Ask) -> list[str]:
        """The replica that each row is a matter of; this one where it has the clip."""
        owners = [self.replica] * len(rows)
        unknown = [number for number, row in enumerate(rows) if not self._is_here(row, ask)]
        if unknown and self.replica and not ask.context.is_passed_on:
            try:
                claimed = await self.board.claim(
                    self.replica, [rows[number].clip_digest for number in unknown]
                )
            except BoardAwayError as error:
                logger.warning("%s; clips that nobody here has are computed here", error)
                return owners
            for number, owner in zip(unknown, claimed, strict=True):
                owners[number] = owner
        return owners

    def _is_here(self, row: RequestRow, ask: _Ask) -> bool:
        has = (row.clip_digest, ask.dtype) in self.batcher.memory or row.clip_digest in ask.on_disk
        return has or self.batcher.pending_clip(row.clip_digest) is not None

    async def _on_disk(self, request: Request, rows: Sequence[RequestRow]) -> dict[bytes, EncodedTarget]:
        if self.disk is None or request.target_dtype != self.disk.dtype:
            return {}
        digests = {row.clip_digest for row in rows}
        wanted = [
            digest
            for digest in digests
            if (digest, self.disk.dtype) not in self.batcher.memory
            and self.batcher.pending_clip(digest) is None
        ]
        return await self.disk.find(wanted) if wanted else {}

    async def _answer_own(self, rows: list[RequestRow], ask: _Ask) -> list[_Outcome]:
        outcomes = await _all(
            self._ask(row, ask) if row.clip is None else self._bring(row, ask) for row in rows
        )
        self.batcher.counters.clips_served += sum(outcome.status == "ok" for outcome in outcomes)
        self.batcher.counters.need_clip += sum(outcome.status == "need_clip" for outcome in outcomes)
        return outcomes

    async def _pass_on(self, owner: str, rows: list[RequestRow], ask: _Ask) -> list[_Outcome]:
        """The outcomes that the owner of the rows says, or this replica's where it is lost. See Note
        [owners]."""
        # Each clip once, whole: rows are cut, and equal rows answered alike, where the answer leaves.
        whole = list({row.clip_digest: replace(row, token_idx=None) for row in rows}.values())
        self.batcher.counters.passed_on += len(whole)
        max_bytes = wire.max_response_bytes(len(whole), codec.num_bytes(ask.dtype, *self.target_shape))
        asking = asyncio.create_task(
            self.peers.ask(
                owner, ask.dtype, whole, ask.context.headers(), max_bytes=max_bytes, take=ask.context.take
            )
        )
        try:
            if rows[0].clip is None:
                await asyncio.wait([asking, ask.granted], return_when=asyncio.FIRST_COMPLETED)
                if not asking.done():
                    return [_LEASED] * len(rows)
            header, answered = await asking
        except PeerLostError as error:
            logger.warning("%s; its clips are computed here", error)
            with suppress(BoardAwayError):
                await self.board.lost(owner)
            return await self._answer_rows(rows, ask)
        finally:
            asking.cancel()
        outcomes = {
            row.clip_digest: _Outcome(row.status, row.encoded, number in header.leased)
            for number, row in enumerate(answered)
        }
        if any(outcome.status == "need_clip" and not outcome.leased for outcome in outcomes.values()):
            ask.grant()
        num_ok = Counter(outcomes[row.clip_digest].status for row in rows)["ok"]
        num_equal = num_ok - Counter(outcome.status for outcome in outcomes.values())["ok"]
        self.batcher.counters.coalesced += num_equal
        self.batcher.counters.clips_served += num_equal
        return [outcomes[row.clip_digest] for row in rows]

    def _refusals(self, rows: list[RequestRow]) -> list[RowStatus | None]:
        """What is wrong with each row's bytes, if anything. Hashes, so not for the event loop."""
        return [self._refusal(row) for row in rows]

    def _refusal(self, row: RequestRow) -> RowStatus | None:
        if row.clip is None:
            return None
        if memoryview(row.clip).nbytes != np.prod(self.clip_shape):
            return "bad_shape"
        clip = np.frombuffer(memoryview(row.clip), dtype=np.uint8).reshape(self.clip_shape)
        return None if clip_digest(clip) == row.clip_digest else "bad_digest"

    async def _bring(self, row: RequestRow, ask: _Ask) -> _Outcome:
        """The target of a row with bytes."""
        assert row.clip is not None
        if (encoded := self._remember(row, ask)) is not None:
            return _Outcome("ok", encoded)
        pending = self.batcher.pending_clip(row.clip_digest)
        if pending is None:
            pending = self.batcher.submit(row.clip_digest, row.clip, ask.context.share)
            self.leases.fulfil(row.clip_digest, ask.context.share)
            self.origins.add(row.clip_digest, ask.context.share.run)
            ask.num_computed += 1
        else:
            self.batcher.counters.coalesced += 1
        with self.batcher.waiting(pending):
            encoded = await asyncio.shield(pending.result(ask.dtype))
        self._count_shared(row, ask)
        return _Outcome("ok", encoded)

    async def _ask(self, row: RequestRow, ask: _Ask) -> _Outcome:
        """The target of a row without bytes, or need_clip. See Note [leases]."""
        while True:
            if (encoded := self._remember(row, ask)) is not None:
                return _Outcome("ok", encoded)
            pending = self.batcher.pending_clip(row.clip_digest)
            if pending is not None:
                with self.batcher.waiting(pending):
                    result = pending.result(ask.dtype)
                    await asyncio.wait([result, ask.granted], return_when=asyncio.FIRST_COMPLETED)
                if not result.done():
                    return _LEASED
                self.batcher.counters.coalesced += 1
                self._count_shared(row, ask)
                return _Outcome("ok", result.result())
            end = await self._lease_end(row.clip_digest, ask)
            if end is None:
                return _LEASED
            if end is LeaseEnd.YOURS:
                ask.grant()
                return _Outcome("need_clip")

    async def _lease_end(self, digest: bytes, ask: _Ask) -> LeaseEnd | None:
        """How the wait for a clip's lease ends; None if this request is to upload other clips first."""
        if digest not in self.leases:
            self.leases.grant(digest, ask.context.share)
            return LeaseEnd.YOURS
        waiter = self.leases.wait(digest, ask.context.share)
        try:
            await asyncio.wait([waiter, ask.granted], return_when=asyncio.FIRST_COMPLETED)
            return waiter.result() if waiter.done() else None
        finally:
            waiter.cancel()  # whoever left is not given the lease

    def _remember(self, row: RequestRow, ask: _Ask) -> EncodedTarget | None:
        encoded = self.batcher.memory.get(row.clip_digest, ask.dtype)
        if encoded is not None:
            self.batcher.counters.from_memory += 1
        elif (encoded := ask.on_disk.get(row.clip_digest)) is not None:
            self.batcher.counters.from_disk += 1
            self.batcher.memory.put(row.clip_digest, ask.dtype, encoded)
        if encoded is not None:
            self._count_shared(row, ask)
        return encoded

    def _count_shared(self, row: RequestRow, ask: _Ask) -> None:
        """Counts a row that is answered, where another run had its target computed."""
        is_shared = self.origins.is_others(row.clip_digest, ask.context.share.run)
        ask.num_shared += is_shared
        self.batcher.counters.shared += is_shared


async def _all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, all at once; where one fails or the caller leaves, the others end too."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
