"""Trying again: backoff, jitter, a budget, and a circuit that opens when the budget is spent."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0


class RetryableError(RuntimeError):
    """An answer that another try may better."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class TeacherUnavailableError(ConnectionError):
    """The teacher service did not answer within the budget."""


class Retries:
    """Attempts at one service, from any thread.

    Note [circuit]: an attempt that fails for longer than the budget opens the circuit. From then on every
    attempt fails at once, those that wait for their next try too, so that all of a run's requests learn of
    the loss together; until ``mend``.
    """

    def __init__(self, url: str, budget_s: float | None) -> None:
        """``budget_s``: of one attempt and its repetitions; None tries for ever."""
        self._url, self._budget_s = url, budget_s
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._lost: str | None = None
        self._closing = threading.Event()
        self._thread = threading.local()
        self._lost_since_s = 0.0
        self._counters: dict[str, int | float] = {"retries": 0, "teacher_losses": 0, "teacher_lost_s": 0.0}

    @property
    def tried(self) -> int:
        """How often this thread has tried what it tries now."""
        return getattr(self._thread, "tried", 0)

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open: the service is lost."""
        return self._lost is not None

    def counters(self) -> dict[str, int | float]:
        """Attempts repeated, times that the circuit opened, seconds that it was open."""
        with self._lock:
            lost_s = 0.0 if self._lost is None else time.monotonic() - self._lost_since_s
            return {**self._counters, "teacher_lost_s": self._counters["teacher_lost_s"] + lost_s}

    def __call__(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns; after RetryableError it is tried again.

        Raises TeacherUnavailableError when the budget is spent and while the circuit is open, ConnectionError
        after ``close``.
        """
        started, clock = time.monotonic(), time.strftime("%H:%M:%S")
        pause_s, self._thread.tried = _FIRST_PAUSE_S, 0
        while True:
            if self._closing.is_set():
                raise ConnectionError("the target source was closed")
            if (lost := self._lost) is not None:
                raise TeacherUnavailableError(lost)
            try:
                return attempt()
            except RetryableError as error:
                wait_s = max(error.after_s, pause_s * random.uniform(0.5, 1.0))
                spent_s = time.monotonic() - started
                if self._budget_s is not None and spent_s + wait_s > self._budget_s:
                    sentence = (
                        f"the teacher at {self._url} failed for {spent_s:.1f} s, and the budget is"
                        f" client.retry_budget_s={self._budget_s:g}: {error}. Start it again and repeat the"
                        " run with --resume"
                    )
                    self._open(sentence)
                    raise TeacherUnavailableError(sentence) from error
                with self._lock:
                    self._counters["retries"] += 1
                log.warning(
                    "teacher %s: %s; it fails since %s (%.0f s), trying again in %.1f s",
                    self._url,
                    error,
                    clock,
                    spent_s,
                    wait_s,
                )
                self._wake.wait(wait_s)
                pause_s, self._thread.tried = min(2 * pause_s, _LONGEST_PAUSE_S), self.tried + 1

    def mend(self) -> None:
        """Closes the circuit: the service answers again."""
        with self._lock:
            if self._lost is None or self._closing.is_set():
                return
            lost_s = time.monotonic() - self._lost_since_s
            self._counters["teacher_lost_s"] += lost_s
            self._lost = None
            self._wake.clear()
        log.warning("teacher %s: answers again, after %.1f s", self._url, lost_s)

    def close(self) -> None:
        """Ends every wait, in every thread."""
        with self._lock:
            self._closing.set()
            self._wake.set()

    def pause(self, seconds: float) -> None:
        """Returns after so long, or when it is closed."""
        self._closing.wait(seconds)

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closing.is_set()

    def _open(self, sentence: str) -> None:
        with self._lock:
            if self._lost is not None or self._closing.is_set():
                return
            self._lost, self._lost_since_s = sentence, time.monotonic()
            self._counters["teacher_losses"] += 1
            self._wake.set()
        log.error("%s", sentence)
