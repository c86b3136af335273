"""What tests of faults ask of a service that was hurt: how long until all is well, and what clips cost then.
With a client of our own, that of docs/protocol.md, which repeats what docs/students.md says."""

import http.client
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from service_tools import Caller
from teacher_tools import random_clips

from salt_distill.common.model.teacher import Teacher
from salt_distill.common.targets import codec

QUIET_S = 5.0
"""A service that answers each time for so long is well: a fault may be felt seconds after it was set."""
NUM_CLIPS = 8
BUDGET_S = 120.0
"""How long a student repeats before its teacher counts as lost."""
_POOL = ThreadPoolExecutor()
_REPEATED = (408, 429, 500, 502, 503, 504)


class HurtService:
    """A service at ``url`` of ``teacher``. Every target that it answers is compared, byte by byte, with one
    that is computed here."""

    def __init__(self, url: str, teacher: Teacher, first_seed: int = 0, num_replicas: int = 2) -> None:
        self._url, self._teacher, self._num_replicas = url, teacher, num_replicas
        self.caller, self._ask = Caller(url), protocol_client()
        self._seeds = itertools.count(1_000_000 + first_seed)  # clips that nobody else asks for
        self.failed: Counter[int | str] = Counter()
        """Requests that were not answered, by what came instead."""

    def watch(self, is_replaced: Callable[[], bool]) -> None:
        """Called when a fault is set; ``is_replaced``: whether what was hurt is there again."""
        self._recovery = _POOL.submit(self._seconds_until_well, time.monotonic(), is_replaced)

    def require_well(self, what: str) -> None:
        """Waits until all is well, prints when that was and what a clip costs, and fails where a clip costs
        more than one forward, whichever replica is asked, or where a route was not found meanwhile."""
        took_s, forwards = self._recovery.result(), self._forwards_per_clip()
        print(
            f"{what}: well after {took_s:.1f} s, {forwards:g} forwards per clip; not answered:",
            dict(self.failed),
        )
        assert forwards == 1
        assert 404 not in self.failed
        self.failed.clear()

    def _seconds_until_well(self, began_s: float, is_replaced: Callable[[], bool]) -> float:
        """Until all replicas are there, and new clips are answered at the first try from then on."""
        well_s = None
        while well_s is None or time.monotonic() - well_s < QUIET_S:
            assert time.monotonic() - began_s < BUDGET_S, self.failed
            started_s = time.monotonic()
            try:
                self._require_right(next(self._seeds))
                is_well = is_replaced() and self.caller.counters()["replicas"] == self._num_replicas
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self._count(error)
                is_well = False
            well_s = (well_s or started_s) if is_well else None
            time.sleep(0.2)
        return well_s - began_s

    def _forwards_per_clip(self) -> float:
        """What clips cost that are asked for twice."""
        before, seeds = self.caller.counters()["clips_computed"], [next(self._seeds) for _ in range(3)]
        for seed in (*seeds, *seeds):
            self._repeat(seed)
        return (self.caller.counters()["clips_computed"] - before) / (len(seeds) * NUM_CLIPS)

    def _repeat(self, seed: int) -> None:
        late_s = time.monotonic() + BUDGET_S
        while True:
            try:
                return self._require_right(seed)
            except (OSError, http.client.HTTPException) as error:
                self._count(error)
                if getattr(error, "code", 503) not in _REPEATED or time.monotonic() > late_s:
                    raise
            time.sleep(0.5)

    def _require_right(self, seed: int) -> None:
        clips = random_clips(NUM_CLIPS, seed)
        expected = [codec.encode(self._teacher.forward(clip[None]), "float16")[0] for clip in clips]
        got = [target.tobytes() for target in self._ask(self._url, clips)]
        if got != [bytes(right.target) for right in expected]:
            pytest.fail(f"a wrong target, of the clips of seed {seed}")

    def _count(self, error: Exception) -> None:
        self.failed[getattr(error, "code", type(error).__name__)] += 1


def protocol_client():
    """``targets(url, clips)`` as it stands in docs/protocol.md; it knows nothing of this project."""
    page = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "salt_distill" not in block
    names = {}
    exec(compile(block, "docs/protocol.md", "exec"), names)
    return names["targets"]
