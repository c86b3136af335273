"""What SIGINT and SIGTERM do to a command: it ends after its own cleaning up, without a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_UNWIND_S = 12.0
"""How long a command that was told to end may take to end itself."""
_timers: list[threading.Timer] = []
"""Each ends this process by force."""


@contextmanager
def ended_by_signals(exit_code: int | None = None) -> Iterator[None]:
    """A block that SIGINT and SIGTERM end: a KeyboardInterrupt in it, the one exception that Ray lets through
    its own calls, and after it ``exit_code``; None: the one that a shell gives a signal. A second signal does
    not interrupt the cleaning up, and one that was ignored stays so."""
    came: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        if _timers:  # it ends already
            return
        came.append(128 + number if exit_code is None else exit_code)
        end_in_time(came[0])
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            sys.exit(came[0])
        raise
    finally:
        for number, handler in before.items():
            # What a process does at its end, such as Ray's own cleaning up, is not interrupted either.
            signal.signal(number, signal.SIG_IGN if came else handler)


def exit_by(number: int) -> NoReturn:
    """Ends this process, with the exit code that a shell gives a signal."""
    end_in_time(128 + number)
    sys.exit(128 + number)


def end_in_time(exit_code: int) -> None:
    """Has this process end by force where it does not end by itself: a library may take what was raised for
    its own, and go on."""
    timer = threading.Timer(_UNWIND_S, os._exit, [exit_code])
    timer.daemon = True
    timer.start()
    _timers.append(timer)


def take_time() -> None:
    """This process does end, and its cleaning up may take as long as it takes."""
    for timer in _timers:
        timer.cancel()
