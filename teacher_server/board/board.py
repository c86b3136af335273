"""The board: what the replicas of one teacher share. Student runs and their groups, who owns a clip,
counters. Pure Python, small values only.

Its methods are coroutines, so that it is used alike as an object of the one replica and as a Ray actor of
many.
"""

import enum
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from salt_distill.common.metrics import ServiceMetrics
from salt_distill.common.protocol import (
    BoardRun,
    BoardRunDetail,
    EndingName,
    Progress,
    ServedHistory,
    Standing,
)
from salt_distill.teacher_server.board.board_file import BoardFile, CountersLine, Line
from salt_distill.teacher_server.board.groups import Groups
from salt_distill.teacher_server.board.history import History
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

    @property
    def word(self) -> EndingName:
        """As the service says it."""
        words: tuple[EndingName, ...] = ("no", "drain", "stop")
        return words[self]


@dataclass
class _Replica:
    """What is known of a replica's process."""

    metrics: ServiceMetrics = field(default_factory=ServiceMetrics)
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
        self._max_runs, self._window_clips = max_runs, window_clips
        self._secret, self._rates = secret or secrets.token_hex(32), Rates()
        self._groups = Groups(group_timeout_s)
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._owners: OrderedDict[bytes, str] = OrderedDict()
        self._urls: set[str] = set()
        self._replicas: dict[str, _Replica] = {}
        self._ended = ServiceMetrics()
        self._history = History()
        self._ending = Ending.NO
        self._saved_s, self._saved = time.monotonic(), self._counters_line()
        self._file = None if file is None else BoardFile(file, teacher)
        if self._file is not None:
            self._file.read(self._take)
            self._file.start(self._everything())

    # Runs

    async def post(self, run: str, progress: Progress, *, token: str = "") -> Standing:
        """Keeps a run's newest progress; where that is in its group. ``token``: the name of who says so."""
        entry = self._entry(run, token)
        entry.post(progress)
        self._groups.post(run, progress.worker, token, progress.group, progress.slot)
        if self._file is not None and progress.worker == 0:
            await self._file.append(entry.line(run, progress), self._everything)
        if progress.group is None:
            return Standing(wait=False, slowest_slot=None, window_clips=self._window, members=0)
        others = self._groups.slots(progress.group, besides=run)  # its own workers meet at every step anyway
        slowest = min([progress.slot, *others])
        return Standing(
            wait=progress.slot - slowest > self._window,
            slowest_slot=slowest,
            window_clips=self._window,
            members=len(self._groups.slots(progress.group)),
        )

    async def runs(self) -> list[BoardRun]:
        """Each run, the one heard of last first."""
        slowest: dict[str, int | None] = {}
        return [self._shown(name, run, slowest) for name, run in reversed(self._runs.items())]

    async def run(self, name: str) -> BoardRunDetail | None:
        """One of them, with its configuration and curve; None where it is not known."""
        run = self._runs.get(name)
        if run is None:
            return None
        listed, curve, val_curve = self._shown(name, run, {}), run.curve.shown(), run.val_curve.shown()
        return BoardRunDetail(**dict(listed), config=run.config, curve=curve, val_curve=val_curve)

    # Replicas

    async def served(
        self,
        replica: str,
        metrics: ServiceMetrics,
        run: str | None = None,
        *,
        token: str = "",
        clips: int = 0,
        computed: int = 0,
        shared: int = 0,
        num_bytes: int = 0,
        ending: int = Ending.NO,
    ) -> int:
        """Keeps a replica's metrics, and counts what a run was sent. Whether the service ends, which a
        replica that knows it tells the others.

        ``replica``: its URL, `#`, and what no other process with this URL has.
        """
        known = self._replicas.setdefault(replica, _Replica())
        known.metrics, known.heard_s = metrics, time.monotonic()
        self._ending = max(self._ending, Ending(ending))
        self._look_after_replicas()
        served = sum(replica.metrics.clips_served for replica in self._replicas.values())
        self._history.add(served + self._ended.clips_served)
        if run is not None:
            entry = self._entry(run, token)
            entry.clips_served += clips
            entry.clips_computed += computed
            entry.clips_shared += shared
            entry.bytes_out += num_bytes
        if time.monotonic() - self._saved_s > _SAVE_S or metrics.draining:
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

    async def leave(self, replica: str) -> None:
        """A replica ends in order: its clips are nobody's."""
        self._forget(replica)
        await self._save()

    async def metrics(self) -> ServiceMetrics:
        """The sums over all replicas, those that have ended included, and how many there are; what is held
        now, over those that live."""
        total = self._ended.lasting()
        for replica in self._replicas.values():
            total.add(replica.metrics if replica.alive else replica.metrics.lasting())
        if self._file is not None:
            total.board_corrupt, total.board_not_written = self._file.corrupt, self._file.not_written
        total.replicas = max(1, len(self._urls))
        return total

    async def history(self) -> ServedHistory:
        """What the replicas have sent over the last hour."""
        return self._history.shown()

    # The end

    async def end(self, ending: int) -> None:
        """From now on the replicas take no new requests; each hears of it within a second."""
        self._ending = max(self._ending, Ending(ending))

    async def stop(self) -> None:
        """``end`` with ``Ending.STOP``."""
        await self.end(Ending.STOP)

    async def ending(self) -> tuple[int, bool]:
        """Whether the service ends, and whether every replica has answered what it had begun."""
        alive = [replica.metrics for replica in self._replicas.values() if replica.alive]
        return self._ending, all(metrics.draining and not metrics.open_requests for metrics in alive)

    @property
    def _window(self) -> int:
        return self._window_clips * max(1, len(self._urls))

    def _entry(self, run: str, token: str) -> Run:
        entry = self._runs.setdefault(run, Run())
        self._runs.move_to_end(run)
        entry.seen_s, entry.token = time.time(), token
        self._forget_runs()
        return entry

    def _forget_runs(self) -> None:
        """Keeps ``max_runs``: of the token that has most of them the one that was silent longest is
        forgotten."""
        while len(self._runs) > self._max_runs:
            [(token, _)] = Counter(run.token for run in self._runs.values()).most_common(1)
            del self._runs[next(name for name, run in self._runs.items() if run.token == token)]

    def _shown(self, name: str, run: Run, slowest: dict[str, int | None]) -> BoardRun:
        """``slowest``: of each group that was looked at already."""
        progress, skew_clips = run.progress, None
        if progress is not None and progress.group is not None:
            if progress.group not in slowest:
                slowest[progress.group] = min(self._groups.slots(progress.group), default=None)
            slot = slowest[progress.group]
            skew_clips = None if slot is None else progress.slot - slot
        return BoardRun(
            id=name,
            clips_served=run.clips_served,
            clips_computed=run.clips_computed,
            clips_shared=run.clips_shared,
            bytes_out=run.bytes_out,
            seen_s=run.seen_s,
            hit_rate=run.clips_shared / run.clips_served if run.clips_served else None,
            skew_clips=skew_clips,
            progress=progress,
            status=run.status,
            left_s=run.left_s,
        )

    def _look_after_replicas(self) -> None:
        for name, replica in self._replicas.items():
            if not replica.alive and replica.heard_s > float("-inf"):
                self._lose(name.rpartition("#")[0])
        if len(self._replicas) > _MAX_REPLICAS:
            long_ago = time.monotonic() - _FORGET_S
            for name in [name for name, replica in self._replicas.items() if replica.heard_s < long_ago]:
                self._ended.add(self._replicas.pop(name).metrics.lasting())

    def _lose(self, url: str) -> None:
        self._ended.replicas_lost += url in self._urls  # several may say it of one
        self._forget(url)

    def _forget(self, url: str) -> None:
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

    def _everything(self) -> list[Line]:
        return [self._counters_line(), *(run.whole_line(name) for name, run in self._runs.items())]

    def _counters_line(self) -> CountersLine:
        replicas = {name: replica.metrics.lasting() for name, replica in self._replicas.items()}
        return CountersLine(replicas=replicas, ended=self._ended.lasting())

    def _take(self, line: Line) -> None:
        """A line of the file."""
        if isinstance(line, CountersLine):
            self._replicas = {name: _Replica(metrics=metrics) for name, metrics in line.replicas.items()}
            self._ended = line.ended
            return
        run = self._runs.get(line.run, Run())
        run.read(line)
        self._runs[line.run] = run
        self._runs.move_to_end(line.run)
        self._forget_runs()


class Rates:
    """How fast each token may ask: a bucket for each name, of one second's worth, that fills with time. A
    request is taken whole, and what it takes too much is waited for by the next one."""

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
