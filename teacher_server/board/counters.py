"""What a replica has done, in numbers that add up over replicas."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from salt_distill.common.protocol import Route

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of a histogram's buckets, in seconds; the last bucket has none."""


class Histogram:
    """How often a time fell between two bounds."""

    def __init__(self) -> None:
        self._counts, self._sum_s = [0] * (len(BOUNDS_S) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Counts a time."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._sum_s += seconds

    def parts(self) -> dict[str, float]:
        """Counts by upper bound, and the sum of the times."""
        return {**dict(zip([*map(str, BOUNDS_S), "inf"], self._counts, strict=True)), "sum": self._sum_s}


GAUGES = frozenset(
    {
        *("batch_fill", "queued_clips", "open_requests", "draining", "leases"),
        *("memory_clips", "memory_bytes", "disk_clips"),
    }
)
"""Numbers of a replica that say how things are now, and mean nothing after its end; the others only grow."""


@dataclass
class Counters:
    """What a service has done since it started. ``clips_served = clips_computed + coalesced + from_memory +
    from_disk``, if no client leaves early."""

    clips_served: int = 0
    """Targets sent."""
    clips_computed: int = 0
    """Clips that went through the teacher."""
    coalesced: int = 0
    """Targets sent that another request had already begun."""
    from_memory: int = 0
    """Targets sent that were in memory."""
    from_disk: int = 0
    """Targets sent that were in the cache on disk."""
    passed_on: int = 0
    """Rows that another replica, their clip's owner, was asked for."""
    need_clip: int = 0
    """Rows answered with a request for the clip's bytes."""
    refused: int = 0
    """Rows answered bad_digest or bad_shape."""
    requests: int = 0
    """Requests for targets."""
    busy: int = 0
    """Requests answered 429."""
    expired: int = 0
    """Requests answered 504: their deadline passed."""
    abandoned: int = 0
    """Clips that cost no forward, since everybody who waited for them had left."""
    bytes_in: int = 0
    """Bytes of request bodies."""
    bytes_out: int = 0
    """Bytes of response bodies."""
    forwards: int = 0
    """Teacher forwards, the padded ones too."""
    batch_fill: float = 0.0
    """Clips per forward, over the batch size."""
    forward_s: float = 0.0
    """Seconds in the teacher's forward."""

    retries_seen: int = 0
    """Requests that repeat one, as their clients say."""
    answers: Counter[str] = field(default_factory=Counter)
    """By route and code: `route|code`."""
    queue_wait: Histogram = field(default_factory=Histogram)
    """What clips waited for their forward."""
    forward: Histogram = field(default_factory=Histogram)
    """Forwards."""
    serialise: Histogram = field(default_factory=Histogram)
    """Writing an answer's bytes."""
    request: Histogram = field(default_factory=Histogram)
    """Requests for targets, from their first byte to the last one of the answer."""

    def answered(self, route: str, status: int, seconds: float, *, is_retry: bool) -> None:
        """Counts a request of any route."""
        self.answers[f"{route}|{status}"] += 1
        self.retries_seen += is_retry
        if route == Route.TARGETS:
            self.request.observe(seconds)

    def to_json(self) -> dict[str, int | float]:
        """Plain types. A name with ``|`` is one part of a number that has several."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        parts = {"answers": self.answers} | {
            name: value.parts() for name, value in vars(self).items() if isinstance(value, Histogram)
        }
        return plain | {
            f"{name}|{part}": value for name, values in parts.items() for part, value in values.items()
        }


def without_parts(counters: Mapping[str, int | float]) -> dict[str, int | float]:
    """The counters that are one number each: what people read."""
    return {name: value for name, value in counters.items() if "|" not in name}
