"""Ranks that go on together or stop together: where one cannot go on, all raise what stopped it."""

import concurrent.futures
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_ROUND_S = 5.0
"""How long a rank waits by itself before it meets the others: far below any time-out of a collective."""
_READY, _WAITING, _FAILED = 0, 1, 2


class StopRequest(KeyboardInterrupt):
    """Somebody asked the run to stop: every rank raises it before the same step."""


def never() -> bool:
    """Of who is not asked to stop."""
    return False


class Ranks:
    """The processes of a run. Every rank makes it, and calls its methods in the same order.

    Note [ranks]: a rank whose teacher, or data, has failed takes part in no further step. The others would
    wait for it in the exchange of gradients until that times out, which looks like a hang and says nothing.
    So before a step the ranks meet on the host, and again every few seconds while one of them still waits;
    where one has failed, they exchange its error, and each raises it.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self.clock_s = time.monotonic()
        """At the newest ``result``, in seconds since a moment of the past: the same on every rank."""
        self._group: dist.ProcessGroup | None = None
        if (
            world_size > 1 and dist.get_backend() != "gloo"
        ):  # meet on the host: a rank's GPU goes on with what it has
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def result(self, future: Future[T], is_to_stop: Callable[[], bool] = never) -> tuple[T, float]:
        """What this rank's future comes to, when every rank's has come, and the longest wait of a rank in
        seconds. Raises the error of the first, and StopRequest where one ``is_to_stop``."""
        since, waited_s, state = time.perf_counter(), 0.0, _WAITING
        if self._world_size == 1:
            while not future.done() and not is_to_stop():
                concurrent.futures.wait([future], timeout=_ROUND_S)
            if is_to_stop():
                raise StopRequest
            result, self.clock_s = future.result(), time.monotonic()
            return result, time.perf_counter() - since
        while True:
            if state == _WAITING:
                concurrent.futures.wait([future], timeout=_ROUND_S)
                waited_s = time.perf_counter() - since
                state = _WAITING if not future.done() else _READY if future.exception() is None else _FAILED
            worst, longest_s, stops, self.clock_s = self._largest(
                state, waited_s, is_to_stop(), time.monotonic()
            )
            if worst == _FAILED:
                raise self._first_error(future)
            if stops:
                raise StopRequest
            if worst == _READY:
                return future.result(), longest_s

    def results(
        self, futures: Sequence[Future[T]], is_to_stop: Callable[[], bool] = never
    ) -> tuple[list[T], float]:
        """The same of several, which come at the same time."""
        found = [self.result(future, is_to_stop) for future in futures]
        return [value for value, _ in found], sum(waited_s for _, waited_s in found)

    def all_values(self, value: T) -> list[T]:
        """Each rank's value, in the order of the ranks."""
        values: list[T] = [value] * self._world_size
        if self._world_size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _largest(self, *numbers: float) -> list[float]:
        largest = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return largest.tolist()

    def _first_error(self, future: Future[T]) -> BaseException:
        own_error = future.exception() if future.done() else None
        return next(
            error
            for error in self.all_values(None if own_error is None else _portable(own_error))
            if error is not None
        )


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Where this process stands in the run."""

    rank: int
    world_size: int
    device: torch.device
    is_asked_to_stop: Callable[[], bool] = never

    @cached_property
    def ranks(self) -> Ranks:
        """This rank and the others; all ask for it first at one place."""
        return Ranks(self.world_size)

    def together(self, work: Callable[[], T]) -> T:
        """What this rank's work comes to, when every rank's has. Raises the error of the first rank that has
        one."""
        if self.world_size == 1:
            return work()  # in this thread, which a Ctrl-C ends

        def on_device() -> T:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # of this thread; it starts with the machine's first
            return work()

        with ThreadPoolExecutor(1, thread_name_prefix="together") as thread:
            return self.ranks.result(thread.submit(on_device))[0]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The value summed over the ranks, in place and on the device."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def say(self, sentence: str) -> None:
        """Prints it once."""
        if self.rank == 0:
            print(sentence, flush=True)


def _portable(error: BaseException) -> BaseException:
    """The error, or its sentence where it cannot travel to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, TypeError, AttributeError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
