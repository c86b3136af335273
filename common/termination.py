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
_blocks: list[list[int]] = []
"""The exit codes that wait for the end of each ``uninterrupted`` block."""


@contextmanager
def ended_by_signals(exit_code: int | None = None) -> Iterator[None]:
    """A block that SIGINT and SIGTERM end: a KeyboardInterrupt in it, the one exception that Ray lets through
    its own calls, and after it ``exit_code``; None: the one that a shell gives a signal. A second signal does
    not interrupt the cleaning up, and one that was ignored stays so."""
    came: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        if came or _timers:  # it ends already
            return
        came.append(128 + number if exit_code is None else exit_code)
        _interrupt(came[0])

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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that is done whole: a signal that comes inside ends what follows it. For work that lasts
    seconds."""
    waiting: list[int] = []
    _blocks.append(waiting)
    try:
        yield
    finally:
        _blocks.remove(waiting)
    if waiting:
        _interrupt(waiting[0])


def _interrupt(exit_code: int) -> None:
    if _blocks:
        _blocks[-1].append(exit_code)
        return
    end_in_time(exit_code)
    raise KeyboardInterrupt


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


@contextmanager
def taking_time() -> Iterator[None]:
    """A part of the cleaning up that may take as long as it takes; what follows it ends in time."""
    exit_codes = [next(iter(timer.args)) for timer in _timers]
    take_time()
    try:
        yield
    finally:
        for exit_code in exit_codes:
            end_in_time(exit_code)
