"""Who uploads a clip that several ask for: leases, pure asyncio."""

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum

from salt_distill.teacher_server.sharing.room import Share

_MAX_REMEMBERED = 1000
"""Askers that let a lease lapse lately, at most so many."""


class LeaseEnd(Enum):
    """Why the wait for a leased clip ended."""

    ARRIVED = "arrived"
    """Its bytes are here."""
    YOURS = "yours"
    """Its holder did not upload it; the waiter is to."""


@dataclass(eq=False)
class _Waiter:
    asker: str
    end: "asyncio.Future[LeaseEnd]"


@dataclass
class _Lease:
    holder: str
    timer: asyncio.TimerHandle
    has_lapsed: bool = False
    """Another holder has not uploaded the clip."""
    waiters: deque[_Waiter] = field(default_factory=deque)


class Leases:
    """One short lease per clip that nobody has, for the asker that is to upload it.

    A holder that does not upload costs the others its time once for a clip: after the second lapse everybody
    who waits is to upload, whoever has the bytes. From then on, until it uploads something, that asker is
    told to upload what it asks for, but nobody waits for it. An asker is a token, or a run where there are no
    tokens.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[bytes, _Lease] = {}
        self._lapsed: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, clip_digest: bytes) -> bool:
        return clip_digest in self._leases

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_waiters(self) -> int:
        """Askers that wait for another one's upload."""
        return sum(not waiter.end.done() for lease in self._leases.values() for waiter in lease.waiters)

    def grant(self, clip_digest: bytes, share: Share) -> None:
        """The asker is to upload the clip; others wait for it, unless it has let a lease lapse."""
        assert clip_digest not in self._leases, "a clip has one lease"
        asker = share.owner
        if asker not in self._lapsed:
            self._leases[clip_digest] = _Lease(asker, self._timer(clip_digest))

    def wait(self, clip_digest: bytes, share: Share) -> "asyncio.Future[LeaseEnd]":
        """How the lease of a clip ends. Cancel it to stop waiting."""
        end: asyncio.Future[LeaseEnd] = asyncio.get_running_loop().create_future()
        self._leases[clip_digest].waiters.append(_Waiter(share.owner, end))
        return end

    def fulfil(self, clip_digest: bytes, share: Share) -> None:
        """The bytes of a clip have arrived from an asker: its lease, if there is one, has ended."""
        self._lapsed.pop(share.owner, None)
        lease = self._leases.pop(clip_digest, None)
        if lease is not None:
            lease.timer.cancel()
            for waiter in lease.waiters:
                if not waiter.end.done():
                    waiter.end.set_result(LeaseEnd.ARRIVED)

    def expire(self, clip_digest: bytes) -> None:
        """The holder did not upload the clip: the lease goes to the one who has waited longest, of those that
        have let none lapse where there are such; after a second lapse everybody is to upload."""
        lease = self._leases.pop(clip_digest, None)
        if lease is None:
            return
        lease.timer.cancel()
        self._lapsed[lease.holder] = None
        while len(self._lapsed) > _MAX_REMEMBERED:
            self._lapsed.popitem(last=False)
        waiters = [waiter for waiter in lease.waiters if not waiter.end.done()]  # done: it left
        if lease.has_lapsed or not waiters:
            for waiter in waiters:
                waiter.end.set_result(LeaseEnd.YOURS)
            return
        heir = next((waiter for waiter in waiters if waiter.asker not in self._lapsed), waiters[0])
        waiters.remove(heir)
        self._leases[clip_digest] = _Lease(
            heir.asker, self._timer(clip_digest), has_lapsed=True, waiters=deque(waiters)
        )
        heir.end.set_result(LeaseEnd.YOURS)

    def _timer(self, clip_digest: bytes) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._lease_s, self.expire, clip_digest)
