"""How fast each token may ask: a bucket that fills with time."""

import time
from collections.abc import Callable


class Rates:
    """A bucket for each name, of one second's worth. A request is taken whole, and what it takes too much is
    waited for by the next one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str, amount: float, *, per_s: float) -> float:
        """0 where the amount was taken; else the seconds after which it is worth asking again."""
        now = self._clock()
        level, since = self._levels.get(name, (per_s, now))
        level = min(per_s, level + (now - since) * per_s)
        taken = amount if level >= 0 else 0.0
        self._levels[name] = (level - taken, now)
        return max(0.0, -level / per_s)
