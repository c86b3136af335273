"""How many replicas the waiting clips call for. Ray Serve pickles this module's policy by value, so it stands
alone."""

import math
from typing import Any


class WaitingClips:
    """A policy of Ray Serve's autoscaler. What students wait for their targets is what waits before them,
    over a replica's speed."""

    def __init__(self, clips_per_replica: int) -> None:
        self._clips_per_replica = clips_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The replicas wanted, and no state. Ray Serve bounds and delays it."""
        waiting = sum((context.aggregated_metrics or {}).get("waiting_clips", {}).values())
        return max(1, math.ceil(waiting / self._clips_per_replica)), {}
