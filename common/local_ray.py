"""Which Ray a command joins: the one it is told of, or a private one on this machine that ends with the
command.

This module does not import Ray where it is imported: the private Ray belongs to a process of its own, see
``private_ray``.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from salt_distill.common import private_ray
from salt_distill.common.termination import exit_by

_PLACE = Path("/tmp")  # short: Ray puts sockets below it, whose paths have at most 107 characters
_PREFIX = "salt-ray-"
_SESSION = "session"
"""File in the folder of a private Ray: the session that its processes are in, and where its number holds."""
_ANSWER_S = 5.0
"""How long a Ray may take to say that it is there."""
_UNWIND_S = 10.0
"""How long a command whose private Ray has ended may take to end itself."""
_NEW_S = 60.0
"""A folder without a session may be so new that its process is not there yet."""
_lost = threading.Event()
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""With which a client of HTTP/2 begins; a server answers with a frame of the same kind, its fourth byte a
4."""


@contextmanager
def ray_to_join(
    address: str | None, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Arguments of ``join`` for ``address``, else RAY_ADDRESS, else a private Ray that lives as long as the
    block.

    ``environment``: variables for this process and those of a private Ray; ``{folder}`` in them is that Ray's
    own folder. Import Ray inside the block. Raises ConnectionError where no Ray answers at the address, or
    where the private one does not start, or ends before the block does.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not is_private(address):
        yield {"address": _answering(address), **quiet}
        return
    with _private_ray(environment or {}) as private_address:
        yield {"address": private_address, **quiet}


def join(arguments: Mapping[str, Any]) -> None:
    """``ray.init``, after which SIGTERM does what it did before. No worker imports what lies in the working
    directory: Ray puts that on every worker's path."""
    import ray
    from ray._private import workers

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.chdir(next(iter(workers.__path__))):
            ray.init(**arguments)
    except SystemExit:  # what Ray's own handler raises, with another exit code
        exit_by(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)


def leave() -> None:
    """``ray.shutdown``, after which SIGTERM does what it did before: Ray takes this process's handler away
    with its own, and the next SIGTERM would end it at once, with all that it began left behind."""
    import ray

    ray.shutdown()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def is_lost() -> bool:
    """Whether the private Ray of this process has ended before it was told to."""
    return _lost.is_set()


def is_private(address: str | None) -> bool:
    """Whether ``ray_to_join`` starts a Ray of its own for this address."""
    return not (address or os.environ.get("RAY_ADDRESS"))


def _answering(given: str | None) -> str:
    """The address of the Ray that a command is told of. Raises ConnectionError where none answers there."""
    address = given or os.environ["RAY_ADDRESS"]
    shown = f"--address {address}" if given else f"RAY_ADDRESS={address}"
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address_or_die

        address = canonicalize_bootstrap_address_or_die("auto")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"got {shown}, expected HOST:PORT or `auto`: leave it out for a Ray of the command's own"
        )
    speaks_tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")  # as Ray reads it
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as connection:
            if speaks_tls:
                return address  # a greeting in the clear gets no answer there
            connection.sendall(_HELLO)
            answer = connection.recv(9)
    except OSError as error:
        raise ConnectionError(
            f"got {shown}, where no Ray answers: {error}: start that Ray, give another address, or leave it"
            " out for a Ray of the command's own"
        ) from error
    if answer[3:4] != b"\x04":
        raise ConnectionError(f"got {shown}, where something else than a Ray answers: give its own address")
    return address


@contextmanager
def _private_ray(environment: Mapping[str, str]) -> Iterator[str]:
    """The address of a Ray that lives as long as the block."""
    _remove_what_is_left()
    if shutil.which("bash") is None:
        raise ValueError(
            f"got PATH={os.environ.get('PATH', '')} without bash, with which Ray starts its workers: add"
            " its folder, such as /bin"
        )
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PLACE))  # closed to others
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # until this process and the one that owns Ray have ended
    added = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # The one way to have Ray listen on the loopback alone: without a cluster it takes no other address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **{name: value.format(folder=folder) for name, value in environment.items()},
    }
    with contextlib.ExitStack() as after:
        after.callback(os.close, lock)
        after.callback(shutil.rmtree, folder, ignore_errors=True)
        after.enter_context(_variables(added))
        yield from _owned_ray(folder, lock)


@contextmanager
def _variables(added: Mapping[str, str]) -> Iterator[None]:
    """These environment variables inside the block, and what there was after it."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _owned_ray(folder: Path, lock: int) -> Iterator[str]:
    """The address of a Ray whose owner, a process of its own, ends with this generator."""
    owner = subprocess.Popen(
        [sys.executable, "-P", "-m", private_ray.__name__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        pass_fds=(lock,),
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # of Ray's own processes too
    )
    assert owner.stdin is not None and owner.stdout is not None  # noqa: PT018
    ends = threading.Event()
    try:
        try:
            (folder / _SESSION).write_text(_session_line(owner.pid))
            address = owner.stdout.readline().strip()
        except BaseException:  # a signal: nothing has begun in this Ray, and it has not to end in order
            owner.kill()
            raise
        if not address:
            raise ConnectionError(f"the private Ray did not start: {_last_lines(folder / private_ray.LOG)}")
        watch = _Watch(owner, folder, ends)
        try:
            yield address
        except BaseException as error:
            watch.require_ray(error)
            raise
        watch.require_ray(None)
    finally:
        ends.set()
        owner.stdin.close()
        if owner.wait() != 0:
            private_ray.end_session(owner.pid, 0)


class _Watch:
    """Interrupts this process where its Ray ends before it was told to."""

    def __init__(self, owner: subprocess.Popen[str], folder: Path, ends: threading.Event) -> None:
        self._owner, self._folder, self._ends = owner, folder, ends
        self._ended: str | None = None
        threading.Thread(target=self._wait, name="private-ray", daemon=True).start()

    def require_ray(self, error: BaseException | None) -> None:
        """Raises ConnectionError where Ray has ended: what went wrong beside that followed from it."""
        if self._ended is not None:
            self._answer()
            raise ConnectionError(self._ended) from error

    def _wait(self) -> None:
        assert self._owner.stdout is not None
        self._owner.stdout.read()
        if self._ends.is_set():
            return
        reason = self._folder / private_ray.ENDED
        self._ended = (
            reason.read_text()
            if reason.exists()
            else "this command's private Ray was killed, and all that it has begun with it: start it again"
        )
        _lost.set()
        os.kill(os.getpid(), signal.SIGINT)
        if not self._ends.wait(_UNWIND_S):  # in a call that waits for Ray
            self._answer()
            print(f"error: {self._ended}", file=sys.stderr, flush=True)
            private_ray.end_session(self._owner.pid, 0)
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(1)

    def _answer(self) -> None:
        """Tells the owner of Ray that this process says why it ended, which the owner would do otherwise."""
        assert self._owner.stdin is not None
        with contextlib.suppress(OSError):  # it was killed; unbuffered, since closing would write again
            os.write(self._owner.stdin.fileno(), b"said")


def _remove_what_is_left() -> None:
    """Ends the processes and removes the folders of this user's private Rays whose owners were killed."""
    for folder in _PLACE.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            facts = folder.lstat()
            is_own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
            if not is_own or stat.S_IMODE(facts.st_mode) != 0o700:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody's: else it is refused
                _remove_left(folder, time.time() - facts.st_mtime)
            finally:
                os.close(lock)


def _remove_left(folder: Path, age_s: float) -> None:
    session_file = folder / _SESSION
    if session_file.exists():
        line = session_file.read_text()
        number, _, _ = line.partition(" ")
        if not number.isdecimal():
            return  # nothing that a command writes
        # Numbers are given again after a restart of the machine and in another container; in this one only
        # when no process has the number and no session is named by it.
        same_numbers = line == _session_line(int(number))
        if same_numbers and not private_ray.is_alive(int(number)):
            private_ray.end_session(int(number), 0)
            if private_ray.session_members(int(number)):
                return  # in a call that not even a kill ends; the next command looks again
    elif age_s < _NEW_S or not (folder / private_ray.LOG).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)


def _session_line(number: int) -> str:
    """A session's number, this boot of the machine, and the namespace of its numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{number} {boot} {os.readlink('/proc/self/ns/pid')}"


def _last_lines(path: Path) -> str:
    return " ".join(path.read_text().split("\n")[-4:]).strip() if path.exists() else "it left no log"
