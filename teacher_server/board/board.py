"""The board: what the replicas of one teacher share. Student runs and their groups, who owns a clip,
counters. Pure Python, small values only.

Its methods are coroutines, so that it is used alike as an object of the one replica and as a Ray actor of
many.
"""

import enum
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salt_distill.common.protocol import Progress, Standing
from salt_distill.teacher_server.board.counters import GAUGES
from salt_distill.teacher_server.board.file import BoardFile
from salt_distill.teacher_server.board.rates import Rates
from salt_distill.teacher_server.board.runs import Run

_ALIVE_S = 10.0
"""A replica that was silent for so long is dead. It says that it lives each second."""
_FORGET_S, _MAX_REPLICAS = 3600.0, 100
"""Beyond so many replicas, those that were silent for so long are kept as one sum."""
_SAVE_S = 10.0
"""From one time that the counters are written to the board's file to the next."""


class Ending(enum.IntEnum):
    """Whether a service takes new requests for targets."""

    NO = 0
    """It does."""
    DRAIN = 1
    """It only answers what it has begun."""
    STOP = 2
    """It does so, and then ends."""


@dataclass
class _Replica:
    """What is known of a replica's process."""

    counters: dict[str, int | float] = field(default_factory=dict)
    heard_s: float = float("-inf")
    """When, on the monotonic clock; minus infinity for one that has ended."""

    @property
    def alive(self) -> bool:
        return time.monotonic() - self.heard_s < _ALIVE_S


class Board:
    """See the module. ``window_clips``: the targets that one replica's memory holds. ``teacher``: its
    fingerprint.

    With ``file`` it is what it was when it starts again, after a kill of its process or of the whole service:
    runs with their curves and configurations, and what all replicas have done. What a run was sent since its
    last report, and a replica did in its last seconds, is not in the file; a replica that lives on says it
    again.
    """

    def __init__(
        self,
        *,
        max_runs: int,
        group_timeout_s: float,
        window_clips: int,
        teacher: str,
        file: Path | None = None,
        secret: str | None = None,
    ) -> None:
        """``secret``: what the replicas know each other by; None: a new one."""
        self._max_runs, self._group_timeout_s, self._window_clips = max_runs, group_timeout_s, window_clips
        self._secret, self._rates = secret or secrets.token_hex(32), Rates()
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._owners: OrderedDict[bytes, str] = OrderedDict()
        self._urls: set[str] = set()
        self._replicas: dict[str, _Replica] = {}
        self._ended: Counter[str] = Counter()
        self._ending = Ending.NO
        self._saved_s, self._saved = time.monotonic(), dict[str, Any]()
        self._file = None if file is None else BoardFile(file, teacher)
        if self._file is not None:
            self._file.read(self._take)
            self._file.start(self._everything())

    # Runs

    async def post(self, run: str, progress: Progress) -> Standing:
        """Keeps a run's newest progress; where that is in its group."""
        entry = self._entry(run)
        entry.post(progress)
        if self._file is not None and progress.worker == 0:
            await self._file.append({"run": run, **entry.line(progress)}, self._everything)
        others = self._slots(progress.group, besides=run)  # its own workers meet at every step anyway
        slowest = None if progress.group is None else min([progress.slot, *others])
        window = self._window_clips * max(1, len(self._urls))
        wait = slowest is not None and progress.slot - slowest > window
        return Standing(
            wait=wait, slowest_slot=slowest, window_clips=window, members=len(self._slots(progress.group))
        )

    async def runs(self) -> list[dict[str, Any]]:
        """Each run, the one heard of last first: id, what it was sent, progress or None; in a group the clips
        it is ahead of the slowest."""
        return [self._shown(name, run) for name, run in reversed(self._runs.items())]

    async def run(self, name: str) -> dict[str, Any] | None:
        """One of them, with its configuration and curve; None where it is not known."""
        run = self._runs.get(name)
        return (
            None
            if run is None
            else {**self._shown(name, run), "config": run.config, "curve": run.curve.columns()}
        )

    # Replicas

    async def served(
        self,
        replica: str,
        counters: dict[str, int | float],
        run: str | None = None,
        *,
        clips: int = 0,
        computed: int = 0,
        num_bytes: int = 0,
        ending: int = Ending.NO,
    ) -> int:
        """Keeps a replica's counters, and counts what a run was sent. Whether the service ends, which a
        replica that knows it tells the others.

        ``replica``: its URL, `#`, and what no other process with this URL has.
        """
        known = self._replicas.setdefault(replica, _Replica())
        known.counters, known.heard_s = counters, time.monotonic()
        self._ending = max(self._ending, Ending(ending))
        self._look_after_replicas()
        if run is not None:
            entry = self._entry(run)
            entry.clips_served += clips
            entry.clips_computed += computed
            entry.bytes_out += num_bytes
        if time.monotonic() - self._saved_s > _SAVE_S or counters.get("draining"):
            await self._save()
        return self._ending

    async def secret(self) -> str:
        """What a request between replicas carries."""
        return self._secret

    async def take(self, token: str, clips: int, clips_per_s: float) -> float:
        """See ``Rates.take``: a token's rate is that of all replicas together."""
        return self._rates.take(token, clips, per_s=clips_per_s)

    async def knows(self, replica: str) -> bool:
        """Whether a URL is one of the replicas: not before it joins, nor when this board is a new one, or
        others took it for lost."""
        return replica in self._urls

    async def join(self, replica: str, clip_digests: list[bytes]) -> None:
        """One of the replicas from now on, and the owner of the clips that it holds, as far as they are
        nobody's."""
        self._urls.add(replica)
        await self.claim(replica, clip_digests)

    async def claim(self, replica: str, clip_digests: list[bytes]) -> list[str]:
        """The owner of each clip, a replica's URL; a clip that nobody owns is the asker's. See Note [owners]
        in exchange."""
        owners = []
        for digest in clip_digests:
            owners.append(self._owners.setdefault(digest, replica))
            self._owners.move_to_end(digest)
        while len(self._owners) > 2 * (self._window_clips + 1000) * max(
            1, len(self._urls)
        ):  # their targets are not in memory any more
            self._owners.popitem(last=False)
        return owners

    async def lost(self, replica: str) -> None:
        """A replica does not answer: its clips are nobody's. If it lives on it joins again."""
        self._lose(replica)
        await self._save()

    async def counters(self) -> dict[str, int | float]:
        """The sums over all replicas, those that have ended included, and how many there are; what is held
        now, over those that live."""
        total = Counter(self._ended)
        for replica in self._replicas.values():
            total.update(
                {
                    name: value
                    for name, value in replica.counters.items()
                    if replica.alive or name not in GAUGES
                }
            )
        of_file = (
            {}
            if self._file is None
            else {"board_corrupt": self._file.corrupt, "board_not_written": self._file.not_written}
        )
        return {**total, **of_file, "replicas": max(1, len(self._urls))}

    # The end

    async def end(self, ending: int) -> None:
        """From now on the replicas take no new requests; each hears of it within a second."""
        self._ending = max(self._ending, Ending(ending))

    async def stop(self) -> None:
        """``end`` with ``Ending.STOP``."""
        await self.end(Ending.STOP)

    async def ending(self) -> tuple[int, bool]:
        """Whether the service ends, and whether every replica has answered what it had begun."""
        alive = [replica.counters for replica in self._replicas.values() if replica.alive]
        return self._ending, all(counters["draining"] and not counters["open_requests"] for counters in alive)

    def _entry(self, run: str) -> Run:
        entry = self._runs.setdefault(run, Run())
        self._runs.move_to_end(run)
        entry.seen_s = time.time()
        while len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
        return entry

    def _slots(self, group: str | None, besides: str | None = None) -> list[int]:
        """Where the live members of a group are, but for those of one run; a member that was silent for the
        time-out has left."""
        since = time.monotonic() - self._group_timeout_s
        members = [
            member for name, run in self._runs.items() if name != besides for member in run.members.values()
        ]
        return [
            progress.slot for progress, posted_s in members if posted_s >= since and progress.group == group
        ]

    def _shown(self, name: str, run: Run) -> dict[str, Any]:
        progress = run.progress
        slots = self._slots(None if progress is None else progress.group)
        shared = {
            "hit_rate": 1 - run.clips_computed / run.clips_served if run.clips_served else None,
            "skew_clips": progress.slot - min(slots) if progress is not None and slots else None,
        }
        return {"id": name, **run.counts(), **shared, "progress": run.shown_progress()}

    def _look_after_replicas(self) -> None:
        for name, replica in self._replicas.items():
            if not replica.alive and replica.heard_s > float("-inf"):
                self._lose(name.rpartition("#")[0])
        if len(self._replicas) > _MAX_REPLICAS:
            long_ago = time.monotonic() - _FORGET_S
            for name in [name for name, replica in self._replicas.items() if replica.heard_s < long_ago]:
                self._ended.update(_lasting(self._replicas.pop(name).counters))

    def _lose(self, url: str) -> None:
        self._urls.discard(url)
        self._owners = OrderedDict((digest, owner) for digest, owner in self._owners.items() if owner != url)
        for name, replica in self._replicas.items():
            if name.rpartition("#")[0] == url:
                replica.heard_s = float("-inf")

    # The file

    async def _save(self) -> None:
        self._saved_s = time.monotonic()
        line = self._counters_line()
        if self._file is not None and line != self._saved:  # a service that is idle writes nothing
            self._saved = line
            await self._file.append(line, self._everything)

    def _everything(self) -> list[dict[str, Any]]:
        return [self._counters_line(), *({"run": name, **run.to_json()} for name, run in self._runs.items())]

    def _counters_line(self) -> dict[str, Any]:
        replicas = {name: _lasting(replica.counters) for name, replica in self._replicas.items()}
        return {"replicas": replicas, "ended": _lasting(self._ended)}

    def _take(self, line: dict[str, Any]) -> None:
        """A line of the file."""
        if "replicas" in line:
            self._replicas = {
                name: _Replica(counters=counters) for name, counters in line["replicas"].items()
            }
            self._ended = Counter(line["ended"])
            return
        entry = self._runs.get(line["run"], Run())
        entry.read(line)
        self._runs[line["run"]] = entry
        self._runs.move_to_end(line["run"])
        while len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)


def _lasting(counters: Mapping[str, int | float]) -> dict[str, int | float]:
    """What stays true of a replica that has ended."""
    return {name: value for name, value in counters.items() if name not in GAUGES}
