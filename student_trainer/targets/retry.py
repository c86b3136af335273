"""Trying again: backoff, jitter, a budget, and a circuit that opens when the budget is spent."""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import tenacity

T = TypeVar("T")

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0


class RetryableError(RuntimeError):
    """An answer that another try may better."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        """``after_s``: when the service says that it is worth it; no longer pause is made than our own
        longest, whatever it says."""
        super().__init__(reason)
        self.after_s = min(after_s, _LONGEST_PAUSE_S)


class TeacherUnavailableError(ConnectionError):
    """The teacher service did not answer within the budget."""


@dataclass
class RetryCounters:
    """What became of the attempts."""

    retries: int = 0
    """Attempts repeated."""
    teacher_losses: int = 0
    """Times that the circuit opened."""
    teacher_lost_s: float = 0.0
    """Seconds that it was open."""


class Retries:
    """Attempts at one service, from any thread.

    Note [circuit]: an attempt that fails for longer than the budget opens the circuit. From then on every
    attempt fails at once, those that wait for their next try too, so that all of a run's requests learn of
    the loss together; until ``mend``.
    """

    def __init__(self, url: str, budget_s: float | None, connect_budget_s: float | None = None) -> None:
        """``budget_s``: of one attempt and its repetitions; None tries for ever. ``connect_budget_s``: the
        same until the service has answered anything; None: no other."""
        self._url, self._budget_s, self._connect_budget_s = url, budget_s, connect_budget_s
        self.was_reached = False
        """The service itself has answered, whatever it said."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._lost: str | None = None
        self._closing = threading.Event()
        self._thread = threading.local()
        self._lost_since_s = 0.0
        self._counters = RetryCounters()

    @property
    def tried(self) -> int:
        """How often this thread has tried what it tries now."""
        return getattr(self._thread, "tried", 0)

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open: the service is lost."""
        return self._lost is not None

    def counters(self) -> RetryCounters:
        """As they are now."""
        with self._lock:
            lost_s = 0.0 if self._lost is None else time.monotonic() - self._lost_since_s
            return replace(self._counters, teacher_lost_s=self._counters.teacher_lost_s + lost_s)

    def __call__(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns; after RetryableError it is tried again.

        Raises TeacherUnavailableError when the budget is spent and while the circuit is open, ConnectionError
        after ``close``.
        """
        self._thread.tried, clock = 0, time.strftime("%H:%M:%S")
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RetryableError),
            wait=_pause_s,
            stop=self._is_spent,
            sleep=self._sleep,
            before_sleep=lambda state: self._count_retry(state, clock),
            retry_error_callback=self._give_up,
        )
        try:
            return retrying(lambda: self._try(attempt))
        finally:
            self._thread.tried = 0  # what this thread sends next repeats nothing

    def _try(self, attempt: Callable[[], T]) -> T:
        if self._closing.is_set():
            raise ConnectionError("the target source was closed")
        if (lost := self._lost) is not None:
            raise TeacherUnavailableError(lost)
        return attempt()

    def _sleep(self, seconds: float) -> None:
        self._wake.wait(seconds)

    def _is_spent(self, state: tenacity.RetryCallState) -> bool:
        spent_s = state.seconds_since_start or 0.0
        budget_s = self._budget_s
        if budget_s is not None and self._connect_budget_s is not None and not self.was_reached:
            budget_s = min(budget_s, self._connect_budget_s)
        return budget_s is not None and spent_s + state.upcoming_sleep > budget_s

    def _count_retry(self, state: tenacity.RetryCallState, clock: str) -> None:
        self._thread.tried = state.attempt_number
        with self._lock:
            self._counters.retries += 1
        logger.warning(
            "teacher %s: %s; it fails since %s (%.0f s), trying again in %.1f s",
            self._url,
            _failure(state),
            clock,
            state.seconds_since_start,
            state.upcoming_sleep,
        )

    def _give_up(self, state: tenacity.RetryCallState) -> NoReturn:
        spent_s, failure = state.seconds_since_start, _failure(state)
        if self.was_reached:
            sentence = (
                f"the teacher at {self._url} failed for {spent_s:.1f} s, and the budget is"
                f" client.retry_budget_s={self._budget_s:g}: {failure}. Start it again and repeat the run"
                " with --resume"
            )
        else:
            sentence = (
                f"no teacher answered at {self._url} for {spent_s:.1f} s: {failure}. Start it, or give its"
                " own URL; --on-teacher-loss wait, or more client.connect_budget_s, waits longer"
            )
        self._open(sentence)
        raise TeacherUnavailableError(sentence) from failure

    def mend(self) -> None:
        """Closes the circuit: the service answers again."""
        with self._lock:
            if self._lost is None or self._closing.is_set():
                return
            lost_s = time.monotonic() - self._lost_since_s
            self._counters.teacher_lost_s += lost_s
            self._lost = None
            self._wake.clear()
        logger.warning("teacher %s: answers again, after %.1f s", self._url, lost_s)

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
            self._counters.teacher_losses += 1
            self._wake.set()
        logger.error("%s", sentence)


def _pause_s(state: tenacity.RetryCallState) -> float:
    """Twice as long each time, with jitter; no shorter than what the service asked for."""
    backoff_s = min(_FIRST_PAUSE_S * 2 ** min(state.attempt_number - 1, 10), _LONGEST_PAUSE_S)
    return max(_failure(state).after_s, backoff_s * random.uniform(0.5, 1.0))


def _failure(state: tenacity.RetryCallState) -> RetryableError:
    error = None if state.outcome is None else state.outcome.exception()
    assert isinstance(error, RetryableError), "only these are repeated"
    return error
