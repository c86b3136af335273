"""What a teacher service hears of a run, and, in a group, answers: whether the run may go on asking."""

import collections
import logging
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import JsonValue

from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.protocol import Progress, RunState
from salt_distill.student_trainer.targets.client import ServiceClient

logger = logging.getLogger(__name__)

_REPORTED = RunState.model_fields.keys() & MetricsLine.model_fields.keys()
"""What the service's board shows of a line of metrics."""
_JUDGED = {"val_loss", "val_step", "predicted_accuracy", "predicted_low", "predicted_high"}
"""What is measured now and then, and holds until it is measured again."""
_POLL_S = 1.0
"""From one post of a group's member to its next."""
_CONFIG_EVERY_S = 60.0
"""From one post with the run's configuration to the next: a service that was started again without its file
learns of it."""


class GroupMember:
    """One rank of a run on the board of a teacher service, and in its group. A board that does not answer
    stops no run, and holds none back.

    Note [groups]: targets are shared while runs stay within the service's memory of each other. A run in a
    group posts the first slot whose target it still lacks: from there on it needs what others have computed.
    Before it asks for more it looks how far the slowest run of the group is, and waits where the clips
    between that run's slot and its own would not fit the memory. Each rank does so for its own part of the
    batches, and is a member of the group; it waits for other runs only.
    """

    def __init__(
        self,
        client: ServiceClient,
        group: str | None,
        rank: int,
        config: dict[str, JsonValue] | None = None,
        *,
        num_steps: int | None = None,
    ) -> None:
        """``config``: what the board shows of the run's configuration. ``num_steps``: of the whole run."""
        self._client, self._group, self._rank, self._config = client, group, rank, config
        self._config_s = -math.inf
        self._posts = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._lock = threading.Lock()
        self._has_left = False
        self._state, self._num_steps = RunState(step=0, slot=0), num_steps
        self._has_reported = False
        self._lacking: collections.Counter[int] = collections.Counter()
        self._asked_end = 0
        self._turn = threading.Lock()  # held through a wait, when the training goes on with what it has
        self._window_end = -math.inf
        self._posted_s = -math.inf
        self._skew_clips, self._wait_s = 0, 0.0

    def report(self, line: MetricsLine, *, is_last: bool = False) -> None:
        """Posts a line of metrics, in the background; one that no board takes, as a diverged run's, is
        counted. ``is_last``: the run has finished."""
        # In every report, since some are left out.
        held_out: Mapping[str, Any] = {"val_step": line.step}
        if line.val_loss is None:
            held_out = self._state.model_dump(include=_JUDGED)
        try:
            state = RunState(
                **{**line.model_dump(include=set(_REPORTED)), **held_out},
                num_steps=self._num_steps,
                activity="finished" if is_last else "running",
            )
        except ValueError as error:
            self._client.progress_failed(error)
            return
        with self._lock:
            self._state, self._has_reported = state, True
        self._posts.submit(lambda: self._client.progress(self._to_post()))  # the newest, when its turn comes

    def lacks(self, slot: int) -> None:
        """Notes a request to come, whose first clip is that of ``slot``."""
        with self._lock:
            self._lacking[slot] += 1

    def has(self, slot: int) -> None:
        """Notes that such a request has ended."""
        with self._lock:
            self._lacking[slot] -= 1
            self._lacking += collections.Counter()  # keeps what is positive

    def hold(self, end: int) -> None:
        """Returns when the run may ask for clips up to slot ``end``: at once without a group."""
        if self._group is None or self._has_left:
            return
        with self._turn:
            if end > self._window_end or time.monotonic() - self._posted_s >= _POLL_S:
                self._post_until_free(end)
            with self._lock:
                self._asked_end = max(self._asked_end, end)

    def metrics(self) -> dict[str, float]:
        """What a line of metrics.jsonl says of the group."""
        return (
            {}
            if self._group is None
            else {"group_skew_clips": self._skew_clips, "group_wait_s": self._wait_s}
        )

    def close(self) -> None:
        """Leaves the group, so that nobody waits for a run that has ended, says that it has ended, and waits
        for the last reports."""
        with self._lock:
            self._has_left = True  # nothing that is still to be posted joins it again
            if self._state.activity == "running":
                self._state = self._state.model_copy(update={"activity": "stopped"})
        with self._turn:  # nor what is being posted
            if self._posted_s > 0 or self._has_reported:
                self._posts.submit(lambda: self._client.progress(self._to_post()))
        self._posts.shutdown(wait=True)

    def _post_until_free(self, end: int) -> None:
        since = None
        while not self._has_left and not self._client.retries.is_closed:
            report = self._to_post()
            standing = self._client.progress(report)
            self._posted_s = time.monotonic()
            if standing is None:
                break
            slowest = report.slot if standing.slowest_slot is None else standing.slowest_slot
            self._skew_clips, self._window_end = (
                max(0, report.slot - slowest),
                slowest + standing.window_clips,
            )
            if not standing.wait and (self._skew_clips == 0 or end <= self._window_end):
                break
            if since is None:
                since = self._posted_s
                logger.warning(
                    "group %s: waiting since %s, %d clips ahead of the slowest of %d members; the teacher"
                    " keeps %d in memory",
                    *(
                        self._group,
                        time.strftime("%H:%M:%S"),
                        self._skew_clips,
                        standing.members,
                        standing.window_clips,
                    ),
                )
            self._client.retries.pause(_POLL_S)
        if since is not None:
            waited_s = time.monotonic() - since
            self._wait_s += waited_s
            logger.warning("group %s: continuing after %.1f s", self._group, waited_s)

    def _to_post(self) -> Progress:
        with self._lock:
            config = None
            if self._config is not None and time.monotonic() - self._config_s >= _CONFIG_EVERY_S:
                self._config_s, config = time.monotonic(), self._config
            values = self._state.model_dump(exclude={"slot", "group", "worker"})
            slot = self._state.slot
            group = None if self._has_left else self._group
            if group is not None:
                slot = min(self._lacking, default=self._asked_end)
            return Progress(**values, slot=slot, group=group, worker=self._rank, config=config)
