"""The board: what the replicas of one teacher share. Student runs and their groups, who owns a clip, counters. Pure Python, small values only.

Its methods are coroutines, so that it is used alike as an object of the one replica and as a Ray actor of many.
"""

import asyncio
import json
import time
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt


class Progress(BaseModel):
    """Where a student run is. Body of ``POST /v1/runs/{id}/progress``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    step: NonNegativeInt
    """Optimizer steps done."""
    slot: NonNegativeInt
    """The next slot of the data order."""
    loss: float | None = None
    """Of this step."""
    flops: NonNegativeFloat | None = None
    """Spent so far, teacher forward included."""
    teacher_wait_ms: NonNegativeFloat | None = None
    """What this step waited for its targets, in milliseconds."""
    clips_per_s: NonNegativeFloat | None = None
    """Of the run, lately."""
    group: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Runs of one data seed that keep together, so that memory serves them all. A report without it leaves the group."""
    worker: NonNegativeInt = 0
    """Which worker of the run says so. Each is a member of the group; only the first one's report is shown."""


class Standing(BaseModel):
    """Where a run is in its group. The answer to a progress report."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    wait: bool
    """The run is further ahead than memory reaches: it asks again, with the same report, before it goes on."""
    slowest_slot: int | None
    """Of the live members of the other runs and of who asks; None without a group."""
    window_clips: int
    """Clips that the replicas' memory holds: how far ahead a member may be."""
    members: int
    """Live members of the group: the workers of its runs."""


@dataclass
class Run:
    """What is known of a student run."""

    clips_served: int = 0
    clips_computed: int = 0
    """Clips that this run caused the forward of."""
    bytes_out: int = 0
    seen_s: float = 0.0
    """When it was heard of last, in seconds since 1970."""
    progress: Progress | None = None
    members: dict[int, tuple[Progress, float]] = field(default_factory=dict)
    """What each worker that is in a group reported last, and when, on the monotonic clock."""


class Board:
    """See the module. ``window_clips``: the targets that one replica's memory holds."""

    def __init__(self, *, max_runs: int, group_timeout_s: float, window_clips: int, file: Path | None = None) -> None:
        self._max_runs, self._group_timeout_s, self._window_clips, self._file = max_runs, group_timeout_s, window_clips, file
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._owners: OrderedDict[bytes, str] = OrderedDict()
        self._replicas: set[str] = set()
        self._counters: dict[str, dict[str, int | float]] = {}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    # Runs

    async def post(self, run: str, progress: Progress) -> Standing:
        """Keeps a run's newest progress; where that is in its group."""
        entry = self._entry(run)
        entry.members.pop(progress.worker, None)
        if progress.group is not None:
            entry.members[progress.worker] = progress, time.monotonic()
        if progress.worker == 0:
            entry.progress = progress
        if self._file is not None and progress.worker == 0:
            line = json.dumps({"run": run, "time_s": entry.seen_s, **progress.model_dump(exclude={"group", "worker"})}) + "\n"
            await asyncio.to_thread(_append, self._file, line)
        others = self._slots(progress.group, besides=run)  # its own workers meet at every step anyway
        slowest = None if progress.group is None else min([progress.slot, *others])
        window = self._window_clips * max(1, len(self._replicas))
        wait = slowest is not None and progress.slot - slowest > window
        return Standing(wait=wait, slowest_slot=slowest, window_clips=window, members=len(self._slots(progress.group)))

    async def served(
        self,
        replica: str,
        counters: dict[str, int | float],
        run: str | None = None,
        *,
        clips: int = 0,
        computed: int = 0,
        num_bytes: int = 0,
    ) -> None:
        """Keeps a replica's counters, and counts what a run was sent."""
        self._counters[replica] = counters
        if run is None:
            return
        entry = self._entry(run)
        entry.clips_served += clips
        entry.clips_computed += computed
        entry.bytes_out += num_bytes

    async def runs(self) -> list[dict[str, Any]]:
        """Each run, the one heard of last first: id, what it was sent, progress or None; in a group the clips it is ahead of the slowest."""
        return [self._shown(name, run) for name, run in reversed(self._runs.items())]

    # Replicas

    async def claim(self, replica: str, clip_digests: list[bytes]) -> list[str]:
        """The owner of each clip, a replica's URL; a clip that nobody owns is the asker's. See Note [owners] in exchange."""
        self._replicas.add(replica)
        owners = []
        for digest in clip_digests:
            owners.append(self._owners.setdefault(digest, replica))
            self._owners.move_to_end(digest)
        while len(self._owners) > 2 * (self._window_clips + 1000) * len(self._replicas):  # their targets are not in memory any more
            self._owners.popitem(last=False)
        return owners

    async def lost(self, replica: str) -> None:
        """A replica does not answer: its clips are nobody's. If it lives on it claims others."""
        self._replicas.discard(replica)
        self._owners = OrderedDict((digest, owner) for digest, owner in self._owners.items() if owner != replica)

    async def counters(self) -> dict[str, int | float]:
        """The sums over all replicas, those that have ended included, and how many there are."""
        total: Counter[str] = Counter()
        for counters in self._counters.values():
            total.update(counters)
        return {**total, "replicas": max(1, len(self._replicas))}

    def _entry(self, run: str) -> Run:
        entry = self._runs.setdefault(run, Run())
        self._runs.move_to_end(run)
        entry.seen_s = time.time()
        while len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
        return entry

    def _slots(self, group: str | None, besides: str | None = None) -> list[int]:
        """Where the live members of a group are, but for those of one run; a member that was silent for the time-out has left."""
        since = time.monotonic() - self._group_timeout_s
        members = [member for name, run in self._runs.items() if name != besides for member in run.members.values()]
        return [progress.slot for progress, posted_s in members if posted_s >= since and progress.group == group]

    def _shown(self, name: str, run: Run) -> dict[str, Any]:
        progress = run.progress
        slots = self._slots(None if progress is None else progress.group)
        shared = {
            "hit_rate": 1 - run.clips_computed / run.clips_served if run.clips_served else None,
            "skew_clips": progress.slot - min(slots) if progress is not None and slots else None,
        }
        entry = {name: value for name, value in asdict(run).items() if name not in ("progress", "members")}
        return {"id": name, **entry, **shared, "progress": None if progress is None else progress.model_dump()}


def _append(file: Path, line: str) -> None:
    with file.open("a") as opened:
        opened.write(line)
