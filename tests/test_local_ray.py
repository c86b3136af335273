"""The Ray that a command joins or starts: what is refused, what others see of it, and how all of it ends."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command_tools import salt
from serve_tools import alive, command_lines, descendants, parts_of, start
from teacher_tools import save_teacher

from salt_distill.common import local_ray, private_ray
from salt_distill.common.local_ray import ray_to_join


@pytest.fixture
def server():
    """A server that answers what it is told, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def answering(listener, data):
    def answer():
        connection, _ = listener.accept()
        connection.sendall(data)
        connection.recv(100)
        connection.close()

    threading.Thread(target=answer, daemon=True).start()


def test_an_address_where_no_ray_answers_is_named(server, monkeypatch):
    monkeypatch.setattr(local_ray, "_ANSWER_S", 0.3)
    address = f"127.0.0.1:{server.getsockname()[1]}"
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = f"127.0.0.1:{other.getsockname()[1]}"
    for dead, reason in ((free, "Connection refused"), (address, "timed out"), ("no.such.invalid:1", "")):
        with pytest.raises(ConnectionError, match=rf"got --address {dead}, where no Ray answers: .*{reason}"):
            ray_to_join(dead).__enter__()
    monkeypatch.setenv("RAY_ADDRESS", free)
    with pytest.raises(ConnectionError, match=f"got RAY_ADDRESS={free}, where no Ray answers"):
        ray_to_join(None).__enter__()
    server.accept()  # of the one that timed out
    answering(server, b"HTTP/1.1 400 Bad Request")
    with pytest.raises(ConnectionError, match="where something else than a Ray answers"):
        ray_to_join(address).__enter__()
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        ray_to_join("nonsense").__enter__()


def test_a_ray_that_speaks_tls_is_not_greeted_in_the_clear(server, monkeypatch):
    address = f"127.0.0.1:{server.getsockname()[1]}"
    answering(server, b"\x15\x03\x01\x00\x02\x02\x46")  # what a TLS port says to that: an alert
    with pytest.raises(ConnectionError, match="where something else than a Ray answers"):
        ray_to_join(address).__enter__()
    monkeypatch.setenv("RAY_USE_TLS", "1")  # as deploy/node.sh sets it on every node of a cluster
    with ray_to_join(address) as arguments:
        assert arguments["address"] == address


def test_a_path_without_bash_is_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(ValueError, match="without bash, with which Ray starts its workers"):
        ray_to_join(None).__enter__()


def test_a_private_ray_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(local_ray, "_PLACE", tmp_path)
    (tmp_path / "ray.py").write_text("raise MemoryError('no shared memory is left')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.raises(ConnectionError, match=r"did not start: .*no shared memory is left"):
        ray_to_join(None, environment={"PYTHONPATH": path}).__enter__()
    assert [path.name for path in tmp_path.glob("salt-ray-*")] == []


def test_what_a_killed_private_ray_left_is_removed_and_what_lives_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ray, "_PLACE", tmp_path)
    names = ("left", "living", "new", "open", "foreign", "earlier", "unborn", "bare")
    folders = [tmp_path / f"salt-ray-{name}" for name in names]
    left, living, new, open_to_all, foreign, earlier, unborn, bare = folders
    for folder in folders:
        folder.mkdir(mode=0o700)
    for folder in (new, unborn):  # whose command was killed before it could name a session
        (folder / private_ray.LOG).write_text("")
    for folder in (unborn, bare):
        os.utime(folder, (0, time.time() - local_ray._NEW_S - 5))
    open_to_all.chmod(0o755)
    (foreign / "session").write_text("of another program")
    (tmp_path / "salt-ray-link").symlink_to(tmp_path / "elsewhere")
    owner = subprocess.Popen(
        ["bash", "-c", "sleep 100 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    agent = int(owner.stdout.readline())
    session = local_ray._session_line(owner.pid)
    (earlier / "session").write_text(f"{owner.pid} another-boot {session.split()[2]}")
    (living / "session").write_text(session)
    owner.kill()
    owner.wait()
    assert alive({agent})
    local_ray._remove_left(earlier, age_s=0)  # its number is another process's now, which lives on
    assert alive({agent})
    for folder in (left, open_to_all):
        (folder / "session").write_text(session)
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    local_ray._remove_what_is_left()
    os.close(lock)
    assert not alive({agent})
    assert sorted(path.name.removeprefix("salt-ray-") for path in tmp_path.iterdir()) == [
        "bare",
        "foreign",
        "link",
        "living",
        "new",
        "open",
    ]


_LEAVES_RAY = """
import os, signal, time
from salt_distill.common.local_ray import join, leave, ray_to_join
from salt_distill.common.termination import ended_by_signals
with ended_by_signals():
    try:
        with ray_to_join(None) as arguments:
            join(arguments)
            leave()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""


def test_a_command_that_has_left_ray_still_cleans_up_after_sigterm(monkeypatch):
    """Ray's own end took the handler away: a sweep died at once, and its runs went on without it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-c", _LEAVES_RAY], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "cleaned up\n"), done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_service_whose_ray_is_lost_ends_with_a_sentence_and_leaves_nothing(part, tmp_path):
    process, url = start(save_teacher(tmp_path / "teacher"))
    family = descendants(process.pid)
    [lost] = parts_of(process.pid, f"/{part}".encode())
    os.kill(lost, signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    print(f"{part} lost: the command ended after {time.monotonic() - began:.1f} s")
    assert process.returncode != 0
    assert f"error: the {part} of this command's private Ray has ended with code -9" in said
    assert "Traceback" not in said
    assert not alive(family)
    with socket.create_server(("127.0.0.1", int(url.rsplit(":", 1)[1]))):
        pass  # nobody holds its port


@pytest.mark.faults
def test_a_command_and_its_ray_that_were_killed_leave_nothing_to_the_next(tmp_path):
    ckpt = save_teacher(tmp_path / "teacher")
    process, _ = start(ckpt)
    family = command_lines(process.pid)
    folders = {
        Path(line[-2].decode()) for line in family.values() if line[-3:-2] == [private_ray.__name__.encode()]
    }
    names = ("private_ray", "gcs_server", "raylet/raylet", "salt_distill.teacher_server")
    for pid, line in family.items():
        if any(name.encode() in b"\0".join(line)[:500] for name in names):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    with ray_to_join(None):
        assert not alive(family)
        assert not any(folder.exists() for folder in folders)


@pytest.mark.faults
def test_workers_import_nothing_of_the_working_directory(tmp_path, shards, monkeypatch):
    ckpt = save_teacher(tmp_path / "teacher")
    (tmp_path / "common").mkdir()
    for name in ("click.py", "common/__init__.py", "grpc.py", "numpy.py", "yaml.py"):
        (tmp_path / name).write_text("raise RuntimeError('of the working directory')")
    monkeypatch.chdir(tmp_path)
    at = ["--ckpt", ckpt, "--data", shards, "--views", 1, "--out", tmp_path / "targets"]
    done = salt("salt-serve", "precompute", *at, "--workers", 1)
    assert "targets of teacher" in done.stderr
