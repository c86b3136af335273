"""`salt-serve teacher` as a process of its own, and what belongs to it."""

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
from pathlib import Path

from teacher_tools import BATCH_SIZE

SALT_SERVE = [sys.executable, "-c", "from salt_distill.programs import serve; serve()"]


def start(ckpt, *flags, environment=None):
    """A server, and its URL once it is ready."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        **(environment or {}),
    }
    command = [*SALT_SERVE, "teacher", "--ckpt", str(ckpt), "--port", "0", "--cpus", "0.5", *flags]
    settings = (
        []
        if any("teacher.batch_size" in flag for flag in flags)
        else ["--set", f"teacher.batch_size={BATCH_SIZE}"]
    )
    process = subprocess.Popen(
        [*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    url = process.stdout.readline().strip()
    assert url.startswith(("http://", "https://")), process.stderr.read()
    return process, url


def end(process):
    """Ends a server in order; what it said."""
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return said


def descendants(root_pid):
    """Every process below one, its private Ray included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {root_pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def command_lines(root_pid):
    """The words of the command line of every process below one."""
    found = {}
    for pid in descendants(root_pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return found


def parts_of(root_pid, program):
    """The processes below one that run a program, by the first word of their command lines."""
    return [pid for pid, line in command_lines(root_pid).items() if program in line[0]]


def alive(pids):
    """Those that still run; a zombie does not."""
    running = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                running.add(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return running


def listening(pids):
    """The addresses at which processes take connections or datagrams, as /proc has them: (address, port)."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table, listens in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == listens and inode in sockets:
                words, port = local.split(":")
                parts = [bytes.fromhex(words[first : first + 8])[::-1] for first in range(0, len(words), 8)]
                found.add((ipaddress.ip_address(b"".join(parts)), int(port, 16)))
    return found


def is_loopback(address):
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
