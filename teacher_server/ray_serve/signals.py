"""What SIGINT and SIGTERM do to ``salt-serve teacher`` once it serves: they are counted, or nothing."""

import signal

from salt_distill.common.termination import take_time


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
