"""Which Ray a command joins: the one it is told of, or a private one on this machine that ends with the
command.

This module does not import Ray where it is imported: the private Ray belongs to a process of its own, this
file run as a program. It sits in its own session, so a Ctrl-C in the terminal reaches the command alone,
which ends its work and then this Ray. And it ends when its standard input does, so a command that is killed
outright takes its Ray with it.
"""

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OBJECT_STORE_BYTES = 256_000_000
"""Ray's shared memory. Clips and targets do not pass through it."""
_END_S = 10.0
"""How long Ray's processes may take to end before they are killed."""


@contextmanager
def ray_to_join(
    address: str | None, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Arguments of ``ray.init`` for ``address``, else RAY_ADDRESS, else a private Ray that lives as long as
    the block.

    ``environment``: variables for this process and those of a private Ray; ``{folder}`` in them is that Ray's
    own folder. Import Ray inside the block.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        yield {"address": address, **quiet}
        return
    folder = tempfile.mkdtemp(
        prefix="salt-", dir="/tmp"
    )  # short: Ray puts sockets in it, whose paths have at most 107 characters
    added = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        **{name: value.format(folder=folder) for name, value in (environment or {}).items()},
    }
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    owner = subprocess.Popen(
        [sys.executable, "-P", "-m", "salt_distill.common.local_ray", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert owner.stdin is not None and owner.stdout is not None  # noqa: PT018
    try:
        started = owner.stdout.readline().strip()
        if not started:
            raise RuntimeError(f"the private Ray did not start: {_last_lines(Path(folder) / 'owner.log')}")
        yield {"address": started, **quiet}
    finally:
        owner.stdin.close()
        owner.wait()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def is_private(address: str | None) -> bool:
    """Whether ``ray_to_join`` starts a Ray of its own for this address."""
    return address is None and "RAY_ADDRESS" not in os.environ


def _last_lines(path: Path) -> str:
    return " ".join(path.read_text().split("\n")[-4:]).strip() if path.exists() else "it left no log"


def _own(folder: str) -> None:
    """Runs a Ray until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log = os.open(f"{folder}/owner.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stderr.fileno())
    import ray

    context: Any = ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ray has set its own
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
    _end_session()
    shutil.rmtree(folder, ignore_errors=True)


def _end_session() -> None:
    """Waits for every other process of this session, and kills what stays."""
    deadline = time.monotonic() + _END_S
    while others := _session_members():
        if time.monotonic() > deadline:
            for pid in others:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def _session_members() -> list[int]:
    """Processes of this session but this one, as /proc lists them; the dead that nobody waited for are
    none."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == os.getpid() and int(stat.parent.name) != os.getpid() and state != "Z":
            members.append(int(stat.parent.name))
    return members


if __name__ == "__main__":
    _own(sys.argv[1])
