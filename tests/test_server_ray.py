"""The real thing: `salt-serve teacher` and `salt-serve precompute` on a private Ray, and what they leave
behind."""

import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from serve_tools import SALT_SERVE, alive, descendants, end, is_loopback, listening, start
from service_tools import Caller, clips_by_digest, wait_until
from teacher_tools import BATCH_SIZE, batch_of, load_teacher, random_clips
from train_tools import metrics_line

from salt_distill.common import private_ray
from salt_distill.common.config import FrozenConfig, ServiceClientConfig, TeacherComputeConfig
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.teacher_server.ray_serve.ingress import free_port


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    return folder / "teacher-0", load_teacher(folder)


def require_closed_to_others(family):
    """That no other user of the machine reaches the folder of a private Ray, whose sockets Ray opens to
    all."""
    command_lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in alive(family)]
    [folder] = {line[-2].decode() for line in command_lines if line[-3:-2] == [private_ray.__name__.encode()]}
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    sockets = [path for path in Path(folder).rglob("*") if path.is_socket() or path.suffix == ".cfg"]
    assert any(path.name == "admin.sock" for path in sockets)
    if os.getuid() == 0:
        look = (
            "import os, sys; os.setgid(65534); os.setuid(65534);"
            " print([os.access(path, os.F_OK) for path in sys.argv[1:]])"
        )
        looked = subprocess.run(
            [sys.executable, "-c", look, *map(str, sockets)], capture_output=True, text=True, check=True
        )
        assert "True" not in looked.stdout


def statuses_until_ready(url):
    """What whoever asks /readyz is answered, from before there is a service until there is one."""
    found, deadline = set(), time.monotonic() + 120
    while 200 not in found and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            found.add(Caller(url).send("GET", "/readyz")[0])
        time.sleep(0.01)
    return found


def require_heads_to_be_bounded(family):
    """That no port of a replica, which everybody on this machine reaches, takes a head without end: the one
    for other replicas, and Ray Serve's own behind HAProxy."""
    replicas = [pid for pid in alive(family) if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    answers = []
    for address, port in listening(replicas):
        with socket.create_connection((str(address), port), timeout=10) as endless:
            endless.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-More: " + b"a" * 100_000)
            answers.append(endless.recv(12))
    assert answers.count(b"HTTP/1.1 431") == 2, answers


def test_serve_share_and_end_without_a_trace(teacher):
    ckpt, local_teacher = teacher
    batch = batch_of(random_clips(24))
    port = free_port("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(statuses_until_ready, f"http://127.0.0.1:{port}")
        process, url = start(ckpt, "--port", str(port))
        assert starting.result() == {503, 200}  # never a 404, which a client takes for its own mistake
    try:
        for path, body in (("/-/routes", b'{"/":"teacher"}'), ("/-/healthz", b"success")):
            assert Caller(url).send("GET", path)[::2] == (200, body)
        family = descendants(process.pid)
        assert len(family) > 4  # Ray's processes are among them
        clients = [ServiceClientConfig(request_clips=size, retry_budget_s=5) for size in (5, 8)]
        students = [
            ServiceTargets(url, "float16", client, f"student-{client.request_clips}") for client in clients
        ]
        local = LocalTargets(local_teacher, "float16")
        try:
            futures = [source.request(batch) for source in (*students, local)]
            results = [future.result(timeout=30) for future in futures]
            students[0].report(
                metrics_line(step=7, slot=56, loss=0.5, flops=1e9, teacher_wait_ms=1.0, clips_per_s=9.0)
            )
        finally:
            for source in (*students, local):
                source.close()
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])
        shown = subprocess.run(
            [*SALT_SERVE, "status", "--url", url, "--json"], capture_output=True, text=True, check=True
        )
        facts = json.loads(shown.stdout)
        assert (facts["counters"]["clips_served"], facts["counters"]["clips_computed"]) == (48, 24)
        assert {run["id"]: run["clips_served"] for run in facts["runs"]} == {"student-5": 24, "student-8": 24}
        assert {run["id"]: (run["progress"] or {}).get("step") for run in facts["runs"]} == {
            "student-5": 7,
            "student-8": None,
        }
        require_heads_to_be_bounded(family)
        family |= descendants(process.pid)
        assert [address for address in listening(family) if not is_loopback(address[0])] == []
        require_closed_to_others(family)
    finally:
        process.send_signal(signal.SIGTERM)
        rest_of_stdout, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert rest_of_stdout == ""
    assert "Traceback" not in said
    assert "is ready (haproxy ingress)" in said.split("\n")[0], said
    assert "WARNING" not in said, said
    assert "ERROR" not in said, said
    assert not alive(family)


def test_two_replicas_behind_one_url(teacher, tmp_path):
    ckpt, local_teacher = teacher
    process, url = start(ckpt, "--replicas", "2", "--cpus", "0.4", "--cache", str(tmp_path))
    try:
        caller = Caller(url)
        facts = caller.json("/v1/teacher")
        assert (facts["buckets"], facts["ingress"]) == (2, "haproxy")
        wait_until(lambda: caller.counters()["replicas"] == 2)
        clips = clips_by_digest(24)
        for run in ("a", "b"):
            for first in range(0, 24, 6):  # bodies that know of no buckets arrive anywhere
                digests = list(clips)[first : first + 6]
                assert caller.statuses(digests, clips, run=run) == ["ok"] * 6
        counters = caller.counters()
        assert (counters["clips_computed"], counters["clips_served"], counters["replicas"]) == (24, 48, 2)
        assert {run["id"]: run["clips_served"] for run in caller.json("/v1/runs")} == {"a": 24, "b": 24}
        passed_on = counters["passed_on"]
        fresh = clips_by_digest(24, seed=1)
        for run in ("a", "b"):
            for bucket in (0, 1):
                digests = [digest for digest in fresh if int.from_bytes(digest[:4], "big") % 2 == bucket]
                header, rows = caller.targets(digests, fresh, run=run, headers={"X-Salt-Bucket": str(bucket)})
                assert header.fingerprint == local_teacher.spec.fingerprint
                assert {row.status for row in rows} == {"ok"}
        counters = caller.counters()
        assert (counters["clips_computed"], counters["passed_on"]) == (
            48,
            passed_on,
        )  # the bucket header led to the owner
    finally:
        said = end(process)
    assert "haproxy ingress, 2 replicas" in said
    assert len(TargetCache(tmp_path)) == 48  # what was not sealed was, at the end


@pytest.mark.faults
def test_a_killed_server_of_anothers_encoder_takes_its_ray_with_it():
    name = "timm-random:test_vit"
    process, url = start(name, "--num-frames", "4", "--crop-size", "16", "--patch-size", "8")
    family = descendants(process.pid)
    try:
        choice = FrozenConfig(ckpt=name, num_frames=4, crop_size=16, patch_size=8)
        local = LocalTargets(
            Teacher(open_encoder(choice), TeacherComputeConfig(batch_size=BATCH_SIZE), torch.device("cpu")),
            "float16",
        )
        served = ServiceTargets(url, "float16", ServiceClientConfig(), "student")
        assert served.spec == local.spec
        results = [source.request(batch_of(random_clips(5))).result(timeout=30) for source in (served, local)]
        assert torch.equal(*results)
        for source in (served, local):
            source.close()
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(family)


def test_a_port_that_is_taken_is_refused_before_anything_starts(teacher):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [*SALT_SERVE, "teacher", "--ckpt", str(teacher[0]), "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use: give another --port" in ended.stderr


@pytest.mark.slow
def test_more_than_the_machine_has_is_refused(teacher):
    command = [*SALT_SERVE, "teacher", "--ckpt", str(teacher[0]), "--port", "0", "--cpus", "9999"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "it needs 9999 CPUs and 0 GPUs, and there are" in ended.stderr
    assert "Traceback" not in ended.stderr
