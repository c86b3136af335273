"""The bytes of requests and answers that a replica holds, and whose they are."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
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

    @property
    def owner(self) -> str:
        """Who answers for it: the token, or without tokens the run."""
        return f"run {self.run}" if self.token is None else f"token {self.token}"


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
        """Bytes that each owner's answers hold: a target counts once for each owner."""
        self._held: dict[int, _HeldTarget] = {}
        self._held_bytes = 0
        """Of all of them, each target once, and of what was copied."""
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
        token_limit = self._token_limit(share, len({other.token for other in self._requests} - {share.token}))
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
        owner = share.owner
        try:
            async with asyncio.timeout(timeout_s):
                while not self._fits(share, distinct, copied_bytes):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            self._refuse(f"answers that are not read fill the room of {self._max_bytes} bytes")
        for key, target in distinct.items():
            if key not in self._held:
                self._held[key] = _HeldTarget(target)
                self._held_bytes += target.num_bytes
            held = self._held[key]
            if not held.answers[owner]:
                self._answers[owner] += target.num_bytes
            held.answers[owner] += 1
        self._answers[owner] += copied_bytes
        self._held_bytes += copied_bytes
        return HeldTargets(self, owner, copied_bytes, list(distinct))

    def let_go(self, ended: "HeldTargets") -> None:
        """Forgets the targets of an answer that has ended."""
        owner = ended.owner
        for key in ended.keys:
            held = self._held[key]
            held.answers[owner] -= 1
            if not held.answers[owner]:
                self._answers[owner] -= held.target.num_bytes
                del held.answers[owner]
            if not held.answers:
                self._held_bytes -= held.target.num_bytes
                del self._held[key]
        self._answers[owner] -= ended.copied_bytes
        self._held_bytes -= ended.copied_bytes
        self._answers = +self._answers
        self._freed.set()

    def _fits(self, share: Share, targets: Mapping[int, EncodedTarget], copied_bytes: int) -> bool:
        """Whether an answer may be held: in all the room what nobody holds yet, in its owner's share what
        that one does not."""
        owner = share.owner
        new = copied_bytes + sum(target.num_bytes for key, target in targets.items() if key not in self._held)
        new_to_owner = copied_bytes + sum(
            target.num_bytes
            for key, target in targets.items()
            if key not in self._held or not self._held[key].answers[owner]
        )
        owned, others = self._answers[owner], len(self._answers.keys() - {owner})
        limit = self._max_bytes // (others + 2) if share.token is None else self._token_limit(share, others)
        return (not new or not self._held_bytes or self._held_bytes + new <= self._max_bytes) and (
            not owned or not new_to_owner or owned + new_to_owner <= limit
        )

    def _token_limit(self, share: Share, num_others: int) -> int:
        if share.token is None:
            return self._max_bytes
        return (self._max_bytes - self._max_bytes // _KEPT_FREE) // (num_others + 1)

    def _refuse(self, sentence: str) -> NoReturn:
        self._counters.busy += 1
        raise BusyError(sentence)


class HeldBytes:
    """The bytes of one request that have come: its own, and those that other replicas answer to it."""

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

    def give_back(self, num_bytes: int) -> None:
        """So many of the bytes are gone."""
        self._room.add(self.share, -num_bytes)
        self.num_bytes -= num_bytes

    def release(self) -> None:
        """All of the request's bytes are gone; may be called again."""
        self._room.add(self.share, -self.num_bytes)
        self.num_bytes = 0


@dataclass
class _HeldTarget:
    target: EncodedTarget
    answers: Counter[str] = field(default_factory=Counter)
    """How many answers of each owner hold it."""


@dataclass
class HeldTargets:
    """The targets of one answer while it is sent."""

    room: Room
    owner: str
    copied_bytes: int
    """The answer's own, beside its targets."""
    keys: list[int] = field(default_factory=list)

    def release(self) -> None:
        """The answer has ended; may be called again."""
        self.room.let_go(self)
        self.keys, self.copied_bytes = [], 0
