"""Who uploads a clip that several ask for: leases, pure asyncio."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from enum import Enum


class LeaseEnd(Enum):
    """Why the wait for a leased clip ended."""

    ARRIVED = "arrived"
    """Its bytes are here."""
    YOURS = "yours"
    """Its holder did not upload it; the lease is now the waiter's."""


@dataclass
class _Lease:
    timer: asyncio.TimerHandle
    waiters: deque[asyncio.Future[LeaseEnd]] = field(default_factory=deque)


class Leases:
    """One short lease per clip that nobody has, for the asker that is to upload it. A holder that dies costs
    the others its time."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[bytes, _Lease] = {}

    def __contains__(self, clip_digest: bytes) -> bool:
        return clip_digest in self._leases

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_waiters(self) -> int:
        """Askers that wait for another one's upload."""
        return sum(not waiter.done() for lease in self._leases.values() for waiter in lease.waiters)

    def grant(self, clip_digest: bytes) -> None:
        """The asker is to upload the clip."""
        assert clip_digest not in self._leases, "a clip has one lease"
        self._leases[clip_digest] = _Lease(timer=self._timer(clip_digest))

    def wait(self, clip_digest: bytes) -> asyncio.Future[LeaseEnd]:
        """How the lease of a clip ends. Cancel it to stop waiting."""
        waiter: asyncio.Future[LeaseEnd] = asyncio.get_running_loop().create_future()
        self._leases[clip_digest].waiters.append(waiter)
        return waiter

    def fulfil(self, clip_digest: bytes) -> None:
        """The bytes of a clip have arrived, from whomever: its lease, if there is one, has ended."""
        lease = self._leases.pop(clip_digest, None)
        if lease is not None:
            lease.timer.cancel()
            for waiter in lease.waiters:
                if not waiter.done():
                    waiter.set_result(LeaseEnd.ARRIVED)

    def expire(self, clip_digest: bytes) -> None:
        """The holder did not upload the clip: the lease goes to the one who has waited longest."""
        lease = self._leases.pop(clip_digest, None)
        if lease is None:
            return
        lease.timer.cancel()
        while lease.waiters:
            waiter = lease.waiters.popleft()
            if not waiter.done():  # done: it left
                lease.timer = self._timer(clip_digest)
                self._leases[clip_digest] = lease
                waiter.set_result(LeaseEnd.YOURS)
                return

    def _timer(self, clip_digest: bytes) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._lease_s, self.expire, clip_digest)
