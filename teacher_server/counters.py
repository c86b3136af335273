"""What a replica has done."""

from dataclasses import asdict, dataclass

GAUGES = frozenset(
    {
        *("batch_fill", "queued_clips", "open_requests", "draining", "leases"),
        *("memory_clips", "memory_bytes", "disk_clips"),
    }
)
"""Numbers of a replica that say how things are now, and mean nothing after its end; the others only grow."""


@dataclass
class Counters:
    """What a service has done since it started. ``clips_served = clips_computed + coalesced + from_memory + from_disk``, if no client leaves early."""

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

    def to_json(self) -> dict[str, int | float]:
        """Plain types."""
        return asdict(self)
