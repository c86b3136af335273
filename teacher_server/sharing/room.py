"""The bytes of requests and answers that a replica holds, and whose they are."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from salt_distill.common.metrics import ServiceMetrics
from salt_distill.common.targets.codec import EncodedTarget

_KEPT_FREE = 4
"""Where tokens are told apart, this part of the room stays for tokens that have nothing here yet: a
quarter."""


class BusyError(RuntimeError):
    """There is no room for more bytes."""


@dataclass(frozen=True)
class Share:
    """Whose bytes and clips they are: first a token, then a run of it. A client can choose its run's id, and
    not its token."""

    token: str | None
    """None where the service has no tokens: runs alone are told apart."""
    run: str


class Room:
    """What a replica may hold, at most ``max_bytes`` of requests and as much of answers.

    Bytes count from when they come, so that who only announces them takes nothing. An idle replica takes any
    request. A run that has bytes here may hold as much as leaves every other such run of its token, and one
    that is still to come, the same; a token as much as leaves every other such token the same, and a quarter
    of all to those to come.
    """

    def __init__(self, max_bytes: int, counters: ServiceMetrics) -> None:
        self._max_bytes, self._counters = max_bytes, counters
        self._requests: Counter[Share] = Counter()
        self._answers: Counter[str] = Counter()
        self._held: dict[int, _HeldTarget] = {}
        self._copied_bytes = 0
        self._freed = asyncio.Event()

    def enter(self, share: Share) -> "HeldBytes":
        """The bytes of a request to come, none yet; leave them with ``release``."""
        return HeldBytes(self, share)

    def require(self, held: "HeldBytes", num_bytes: int) -> None:
        """Raises BusyError unless there is room for so many bytes more of a request."""
        total, share = self._requests.total(), held.share
        others = total - held.num_bytes
        if others and total + num_bytes > self._max_bytes:
            self._refuse(f"{total} bytes of requests wait for the teacher, at most {self._max_bytes} may")
        token_bytes = sum(count for other, count in self._requests.items() if other.token == share.token)
        token_limit = self._token_limit(share, {other.token for other in self._requests} - {share.token})
        if token_bytes > held.num_bytes and token_bytes + num_bytes > token_limit:
            self._refuse(
                f"{token_bytes} bytes of the token of {share.token} wait for the teacher, at most"
                f" {token_limit} may"
            )
        siblings = sum(other.token == share.token and other.run != share.run for other in self._requests)
        run_bytes, run_limit = self._requests[share], token_limit // (siblings + 2)
        if run_bytes > held.num_bytes and run_bytes + num_bytes > run_limit:
            self._refuse(
                f"{run_bytes} bytes of run {share.run} wait for the teacher, at most {run_limit} may beside"
                f" {siblings} other runs"
            )

    def add(self, share: Share, num_bytes: int) -> None:
        """Counts bytes of a request, or with a negative number those that are gone."""
        self._requests[share] += num_bytes
        self._requests = +self._requests  # those that have nothing here are forgotten

    async def hold_targets(
        self, share: Share, targets: Iterable[EncodedTarget], *, copied_bytes: int, timeout_s: float
    ) -> "HeldTargets":
        """Counts what an answer holds until its end: its targets, each once however many answers hold it, and
        bytes that are its own. Waits for room; an idle replica takes any answer. Raises BusyError after
        ``timeout_s``."""
        distinct = {id(target): target for target in targets}
        owner = share.run if share.token is None else f"token {share.token}"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    more = sum(target.num_bytes for key, target in distinct.items() if key not in self._held)
                    if self._fits(owner, more + copied_bytes, apart=share.token is not None):
                        break
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            self._refuse(f"answers that are not read fill the room of {self._max_bytes} bytes")
        for key, target in distinct.items():
            self._held.setdefault(key, _HeldTarget(target)).num_answers += 1
        self._answers[owner] += more + copied_bytes
        self._copied_bytes += copied_bytes
        return HeldTargets(self, owner, more + copied_bytes, copied_bytes, list(distinct))

    def let_go(self, held: "HeldTargets") -> None:
        """Forgets the targets of an answer that has ended."""
        for key in held.keys:
            self._held[key].num_answers -= 1
            if not self._held[key].num_answers:
                del self._held[key]
        self._answers[held.owner] -= held.num_bytes
        self._copied_bytes -= held.copied_bytes
        self._answers = +self._answers
        self._freed.set()

    def _fits(self, owner: str, num_bytes: int, *, apart: bool) -> bool:
        total = self._copied_bytes + sum(held.target.num_bytes for held in self._held.values())
        owned, others = self._answers[owner], len(self._answers) - (self._answers[owner] > 0)
        limit = self._max_bytes - self._max_bytes // _KEPT_FREE if apart else self._max_bytes
        return not num_bytes or (
            (not total or total + num_bytes <= self._max_bytes)
            and (not owned or owned + num_bytes <= limit // (others + 1))
        )

    def _token_limit(self, share: Share, others: set[str | None]) -> int:
        if share.token is None:
            return self._max_bytes
        return (self._max_bytes - self._max_bytes // _KEPT_FREE) // (len(others) + 1)

    def _refuse(self, sentence: str) -> NoReturn:
        self._counters.busy += 1
        raise BusyError(sentence)


class HeldBytes:
    """The bytes of one request that have come."""

    def __init__(self, room: Room, share: Share) -> None:
        self._room, self.share, self.num_bytes = room, share, 0

    def require(self, num_bytes: int) -> None:
        """Raises BusyError where there would be no room for bytes that were announced; takes none."""
        self._room.require(self, num_bytes)

    def take(self, num_bytes: int) -> None:
        """Counts bytes that came. Raises BusyError."""
        self._room.require(self, num_bytes)
        self._room.add(self.share, num_bytes)
        self.num_bytes += num_bytes

    def release(self) -> None:
        """The request's bytes are gone; may be called again."""
        self._room.add(self.share, -self.num_bytes)
        self.num_bytes = 0


@dataclass
class _HeldTarget:
    target: EncodedTarget
    num_answers: int = 0


@dataclass
class HeldTargets:
    """The targets of one answer while it is sent."""

    room: Room
    owner: str
    num_bytes: int
    """Of the targets that no other answer held, and those that are the answer's own."""
    copied_bytes: int
    keys: list[int] = field(default_factory=list)

    def release(self) -> None:
        """The answer has ended; may be called again."""
        self.room.let_go(self)
        self.keys, self.num_bytes, self.copied_bytes = [], 0, 0
