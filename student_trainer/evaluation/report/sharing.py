"""What one teacher for many students saved, from the counters of a teacher service."""

import math
from dataclasses import dataclass
from typing import Any

from salt_distill.common.model.flops import FORWARD_FLOPS


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The service's counters, and what follows from them."""

    clips_served: int
    """Targets that students got."""
    clips_computed: int
    """Clips that the teacher ran."""
    coalesced: int
    """Targets sent that another request had already begun."""
    from_memory: int
    """Targets sent that the service still had."""
    bytes_in: int
    """Bytes that students sent."""
    bytes_out: int
    """Bytes that they got."""
    forward_s: float
    """Seconds in the teacher's forward."""
    clip_bytes: int
    """Bytes of one clip's pixels."""
    forward_flops: float
    """FLOPs of one clip's teacher forward: 2 N D (arXiv:2509.24317, Appendix F)."""

    @property
    def forwards_avoided(self) -> int:
        """Clips that a teacher in every student's own process would have computed in addition."""
        return self.clips_served - self.clips_computed

    @property
    def flops_saved(self) -> float:
        """FLOPs of those forwards."""
        return self.forwards_avoided * self.forward_flops

    @property
    def bytes_not_uploaded(self) -> int:
        """Bytes that students would have sent more, had each of them uploaded every clip."""
        return max(0, self.clips_served * self.clip_bytes - self.bytes_in)


def read_sharing(status: dict[str, Any]) -> Sharing:
    """From what `salt-serve status --json` prints."""
    counters = status["counters"]
    return Sharing(
        clips_served=counters["clips_served"],
        clips_computed=counters["clips_computed"],
        coalesced=counters["coalesced"],
        from_memory=counters["from_memory"],
        bytes_in=counters["bytes_in"],
        bytes_out=counters["bytes_out"],
        forward_s=counters["forward_s"],
        clip_bytes=math.prod(status["clip_shape"]),
        forward_flops=FORWARD_FLOPS * status["num_parameters"] * math.prod(status["grid"]),
    )
