"""The process that owns a private Ray: ``python -P -m salt_distill.common.private_ray FOLDER``.

It is in a session of its own, so a Ctrl-C in the terminal reaches the command alone, which ends its work and
then this Ray. It ends, with all that it started, when its standard input does, so a command that is killed
outright takes its Ray with it; and when a part of Ray that the others cannot do without has ended.
"""

import logging
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

LOG = "owner.log"
"""What this process says, in its folder."""
ENDED = "ended"
"""Why this Ray ended before it was told to, in its folder."""
RAY = "ray"
"""Ray's own folder in it, which Ray opens to everybody; nobody else reaches it in one that is closed."""
_OBJECT_STORE_BYTES = 256_000_000
"""Ray's shared memory. Clips and targets do not pass through it."""
_END_S = 10.0
"""How long Ray's processes may take to end before they are killed."""
_LOOK_S = 0.3
"""From one look at Ray's processes to the next."""
_NEEDED = ("gcs_server", "raylet")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def own(folder: Path) -> None:
    """Runs a Ray until standard input ends, or a part of it does; its address is the one line of standard
    output."""
    _ignore_signals()
    stderr = os.dup(sys.stderr.fileno())
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stderr.fileno())
    import ray

    context: Any = ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder / RAY),
        _node_ip_address="127.0.0.1",
    )
    _ignore_signals()  # Ray has set its own
    print(context.address_info["gcs_address"], flush=True)
    from ray._private import worker

    ended = _wait_for_an_end(worker._global_node)
    if ended is None:
        ray.shutdown()
        _ignore_signals()  # Ray has taken them away
        end_session(os.getpid(), _END_S)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        end_session(os.getpid(), 0)
        _say_end(
            folder, f"{ended}, and with it everything that this command has begun: start it again", stderr
        )
        os._exit(1)  # without Ray's own end, which asks the parts that are gone


def _wait_for_an_end(node: Any) -> str | None:
    """None when standard input has ended, or which part of Ray has."""
    while True:
        if select.select([sys.stdin], [], [], _LOOK_S)[0] and not os.read(sys.stdin.fileno(), 1):
            return None
        for name, process in node.dead_processes():
            if name in _NEEDED:
                return f"the {name} of this command's private Ray has ended with code {process.returncode}"


def _say_end(folder: Path, sentence: str, stderr: int) -> None:
    """Leaves a sentence to the command, and says it itself where Ray has ended that one too, as it does to
    whom its raylet is lost."""
    (folder / ENDED).write_text(sentence)
    os.close(sys.stdout.fileno())  # which tells the command
    answer = b""
    while more := os.read(sys.stdin.fileno(), 1000):
        answer += more
    if not answer:
        os.write(stderr, f"error: {sentence}\n".encode())
    shutil.rmtree(folder, ignore_errors=True)


def end_session(session: int, patience_s: float) -> None:
    """Waits for every process of a session but this one, and kills what stays. One that sleeps in a driver or
    on a lost file server is not waited for longer than ``_END_S``: no kill ends it."""
    deadline = time.monotonic() + patience_s
    while pids := session_members(session):
        if time.monotonic() > deadline + _END_S:
            return
        if time.monotonic() > deadline:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        time.sleep(0.05)


def session_members(session: int) -> list[int]:
    """Processes of a session but this one, as /proc lists them; the dead that nobody waited for are none."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_process = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of_process) == session and int(stat.parent.name) != os.getpid() and state != "Z":
            members.append(int(stat.parent.name))
    return members


def is_alive(pid: int) -> bool:
    """Whether a process runs; the dead that nobody waited for do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    own(Path(sys.argv[1]))
