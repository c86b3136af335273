"""Who is in which group of runs, and how far each member is."""

import time
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass

_MAX_MEMBERS = 4096
"""Members that the runs of one token may have; beyond it the one that was silent longest leaves."""

MemberId = tuple[str, int]
"""A run, and which of its workers."""


@dataclass(frozen=True)
class _Member:
    token: str
    group: str
    slot: int
    posted_s: float
    """On the monotonic clock."""


class Groups:
    """The live members. One that was silent for the time-out has left."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._members: OrderedDict[MemberId, _Member] = OrderedDict()  # the one that was silent longest first
        self._groups: defaultdict[str, set[MemberId]] = defaultdict(set)
        self._of_tokens: Counter[str] = Counter()

    def post(self, run: str, worker: int, token: str, group: str | None, slot: int) -> None:
        """Where a worker is; without a group it leaves the one that it was in."""
        self._remove((run, worker))
        if group is not None:
            self._members[run, worker] = _Member(token, group, slot, time.monotonic())
            self._groups[group].add((run, worker))
            self._of_tokens[token] += 1
            if self._of_tokens[token] > _MAX_MEMBERS:
                self._remove(next(key for key, member in self._members.items() if member.token == token))
        self._let_silent_ones_go()

    def slots(self, group: str | None, *, besides: str | None = None) -> list[int]:
        """Where the live members of a group are, but for those of one run."""
        self._let_silent_ones_go()
        members = self._groups.get(group, ()) if group is not None else ()
        return [self._members[run, worker].slot for run, worker in members if run != besides]

    def _let_silent_ones_go(self) -> None:
        since = time.monotonic() - self._timeout_s
        while self._members and next(iter(self._members.values())).posted_s < since:
            self._remove(next(iter(self._members)))

    def _remove(self, key: MemberId) -> None:
        member = self._members.pop(key, None)
        if member is not None:
            self._of_tokens[member.token] -= 1
            self._groups[member.group].discard(key)
            if not self._groups[member.group]:
                del self._groups[member.group]
