"""What SIGINT and SIGTERM do to ``salt-serve teacher``: end a block, be counted, or nothing."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from salt_distill.common.termination import end_in_time, take_time


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A block that SIGINT and SIGTERM end, after its own cleaning up, as if it had returned."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    catch_signals()
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def catch_signals() -> None:
    """From now on each SIGINT and SIGTERM raises what ends ``ended_by_signals``."""

    def end(number: int, frame: Any) -> None:
        end_in_time(0)
        raise KeyboardInterrupt  # the one exception that Ray lets through its own calls

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def count_signals() -> list[int]:
    """Grows by each SIGINT and SIGTERM from now on."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    return signals


def ignore_signals() -> None:
    """A second Ctrl-C does not stop the cleaning up; were the command killed, its private Ray would still
    end."""
    take_time()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
