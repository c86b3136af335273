"""What a service has served over the last hour: what a page shows that is opened later."""

import time
from collections import deque

from salt_distill.common.protocol import ServedHistory

_EVERY_S = 5.0
_MAX_POINTS = 720
"""An hour."""


class History:
    """How many targets had been sent, every few seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque(maxlen=_MAX_POINTS)

    def add(self, clips_served: int) -> None:
        """Takes the number in, unless the newest point is too near."""
        now = time.time()
        if not self._points or now - self._points[-1][0] >= _EVERY_S:
            self._points.append((now, clips_served))

    def shown(self) -> ServedHistory:
        """The points, the oldest first."""
        return ServedHistory(
            seconds=[round(seconds, 1) for seconds, _ in self._points],
            clips_served=[clips for _, clips in self._points],
        )
