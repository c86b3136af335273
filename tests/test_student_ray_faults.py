"""A student of a teacher on the real Ray Serve, while something goes wrong there: it learns the same, or
stops. Slow: `make test-faults`."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import fault_tools as faults
import pytest
import torch
from fault_tools import linked
from recovery_tools import HurtService
from serve_tools import end, parts_of, start
from service_tools import ARROW, Caller, clips_by_digest, wait_until
from student_tools import open_source, run_of, train
from teacher_tools import load_teacher, save_teacher
from train_tools import RandomClips

from salt_distill.common.config import ServiceConfig
from salt_distill.common.local_ray import ray_to_join
from salt_distill.common.targets import codec, wire
from salt_distill.student_trainer.targets.client import TeacherMismatchError
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.teacher_server.ray_serve.ingress import haproxy_environment

pytestmark = pytest.mark.faults

SIZE, STEPS, DISTURBED_STEP = 30, 20, 4
SETTINGS = (
    "--replicas",
    "2",
    "--cpus",
    "0.4",
    "--set",
    "service.lease_s=1",
    "--set",
    "service.batch_wait_ms=100",
)


@dataclass
class Served:
    """A teacher of two replicas in a Ray that lives as long as the tests of this file."""

    ckpt: Path
    address: str
    url: str
    command: object
    """The `salt-serve teacher` whose teacher it is."""
    background: list[threading.Thread] = field(default_factory=list)

    def start(self, ckpt):
        """Another command for the same teacher, or another one in its place."""
        before = self.command
        self.command, url = start(ckpt, "--address", self.address, *SETTINGS)
        assert url == self.url
        end(before)

    def replicas(self):
        """Their processes."""
        return parts_of(os.getpid(), b"ray::ServeReplica")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    ckpt = save_teacher(tmp_path_factory.mktemp("ckpt") / "teacher-0")
    with ray_to_join(None, haproxy_environment(ServiceConfig().header_timeout_s)) as cluster:
        command, url = start(ckpt, "--address", cluster["address"], *SETTINGS)
        served = Served(ckpt, cluster["address"], url, command)
        try:
            wait_until(lambda: Caller(url).counters()["replicas"] == 2)
            yield served
        finally:
            end(served.command)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("local"))


class DisturbedClips(RandomClips):
    """Clips of a test's own. At one step ``disturb`` is called with what ``clips_of`` that step gives; while
    ``lasts()``, steps take their time."""

    def __init__(
        self,
        clip_shape,
        first_slot: int,
        disturb: Callable = lambda clips: None,
        lasts: Callable = lambda: False,
    ) -> None:
        super().__init__(clip_shape)
        self._first_slot, self._disturb, self._lasts = first_slot, disturb, lasts

    def clips(self, slots):
        clips = super().clips(range(slots.start + self._first_slot, slots.stop + self._first_slot))
        step = slots.start // SIZE
        if step == DISTURBED_STEP:
            self._disturb(dict(zip(clips.digests, clips.pixels, strict=True)))
        if step > DISTURBED_STEP and self._lasts():
            time.sleep(1)
        return clips


# Each takes the service and clips that the student is about to ask for; what it returns is called for as long
# as the fault is to last.


def a_replica_is_killed(service, clips):
    os.kill(service.replicas()[0], signal.SIGKILL)


def all_replicas_are_gone_for_twenty_seconds(service, clips):
    """Those that Ray Serve starts instead are killed as well."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for pid in service.replicas():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def the_holder_of_leases_dies(service, clips):
    """It is told to upload the clips, and is not heard of again."""
    assert set(Caller(service.url).statuses(list(clips))) == {"need_clip"}


def the_first_of_two_clients_leaves(service, clips):
    """While its clips are on their way."""
    for digest, clip in clips.items():
        with suppress(TimeoutError):
            Caller(service.url).statuses([digest], {digest: clip}, timeout=0.02)


def another_run_is_greedy(service, clips):
    """The student is not served after it."""
    many = clips_by_digest(16_000, seed=1)
    for first in range(0, len(many), 4000):  # at most 4096 clips in a request
        assert set(
            Caller(service.url).statuses(list(many)[first : first + 4000], many, run="greedy", timeout=120)
        ) == {"ok"}


def the_service_is_updated(service, clips):
    """By a command for the same teacher: replica by replica."""
    service.start(service.ckpt)


RECOVERED = (a_replica_is_killed, all_replicas_are_gone_for_twenty_seconds, the_service_is_updated)
"""Faults after which there are other replicas."""
IN_BACKGROUND = (all_replicas_are_gone_for_twenty_seconds, another_run_is_greedy, the_service_is_updated)


FAULTS = (a_replica_is_killed, the_holder_of_leases_dies, the_first_of_two_clients_leaves, *IN_BACKGROUND)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_student_learns_the_same(fault, service, teacher, tmp_path):
    torch.set_num_threads(1)
    caller, first_slot, threads, failed = Caller(service.url), 10_000 * (1 + FAULTS.index(fault)), [], []
    hurt = HurtService(service.url, teacher, first_slot)
    wait_until(lambda: len(service.replicas()) == 2 and caller.send("GET", "/readyz")[0] == 200, seconds=90)
    before, replicas = caller.counters()["clips_computed"], set(service.replicas())

    def disturb(clips):
        def run():
            try:
                fault(service, clips)
            except BaseException as error:
                failed.append(error)
                raise

        threads.append(threading.Thread(target=run))
        threads[0].start()
        if fault in RECOVERED:
            hurt.watch(lambda: bool(set(service.replicas()) - replicas))
        if fault not in IN_BACKGROUND:
            threads[0].join()

    config = run_of(tmp_path / "run", service.url, steps=STEPS, client={"retry_budget_s": 90})
    with closing(open_source(config, run=fault.__name__)) as source:
        clips = DisturbedClips(
            config.view.clip_shape,
            first_slot,
            disturb,
            lambda: fault is not another_run_is_greedy and threads[0].is_alive(),
        )
        losses = train(config, source, clips)
        still_disturbed = threads[0].is_alive()
    threads[0].join()
    assert not failed
    if fault in RECOVERED:
        hurt.require_well(fault.__name__)
    if fault in (the_holder_of_leases_dies, the_first_of_two_clients_leaves):
        assert caller.counters()["clips_computed"] - before == STEPS * SIZE
    if fault is another_run_is_greedy:
        assert still_disturbed  # the student did not wait for all that the greedy run asked for
    alone = run_of(tmp_path / "alone", service.url, steps=STEPS)
    with closing(LocalTargets(teacher, config.target_dtype)) as source:
        assert losses == train(alone, source, DisturbedClips(config.view.clip_shape, first_slot))


DAMAGED = {
    "truncated": faults.truncated,
    "bit-in-a-target": faults.flipped(0.8),
    "half-a-target": faults.half_a_target,
    "other-digest": faults.other_digest,
    "duplicated-rows": faults.duplicated,
    "reordered-rows": faults.reordered,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_answer_changes_no_loss(name, service, teacher, tmp_path):
    torch.set_num_threads(1)
    configs = [run_of(tmp_path / name, service.url) for name in ("run", "alone")]
    first_slot = 10_000 * (20 + list(DAMAGED).index(name))
    clips = [DisturbedClips(config.view.clip_shape, first_slot) for config in configs]
    with linked(service.url) as link:
        link.fault, link.every = DAMAGED[name], 5
        config = configs[0].model_copy(update={"teacher_url": (link.url,)})
        with closing(open_source(config, run="damaged")) as source:
            losses = train(config, source, clips[0])
        assert link.num_spoilt > 2
    with closing(LocalTargets(teacher, config.target_dtype)) as source:
        assert losses == train(configs[1], source, clips[1])


def test_bodies_that_are_damaged(service, teacher):
    """Through the real ingress: refused row by row where they can be read, and never a wrong target."""
    caller, clips = Caller(service.url), clips_by_digest(4, seed=2)
    first, second, *others = clips
    body = b"".join(
        wire.write_request(
            "float16",
            [wire.RequestRow(clip_digest=digest, clip=clip.tobytes()) for digest, clip in clips.items()],
        )
    )
    too_large = {
        **ARROW,
        "Content-Length": str(1 + caller.json("/v1/teacher")["limits"]["max_request_bytes"]),
    }
    assert caller.send("POST", "/v1/targets", body[: len(body) // 2], ARROW)[0] == 422
    assert caller.send("POST", "/v1/targets", bytes(len(body)), ARROW)[0] == 422
    assert caller.send("POST", "/v1/targets", body, too_large)[0] == 413
    assert caller.statuses([first, second], {first: clips[second], second: clips[second][1:]}) == [
        "bad_digest",
        "bad_shape",
    ]
    order = [*clips, *reversed(clips), *others]
    _, rows = caller.targets(order, clips)
    expected = {
        digest: codec.encode(teacher.forward(clip[None]), "float16")[0].checksum
        for digest, clip in clips.items()
    }
    assert [(row.clip_digest, row.encoded.checksum) for row in rows] == [
        (digest, expected[digest]) for digest in order
    ]


def test_another_teacher_that_joins_stops_the_run(service, tmp_path):
    other = save_teacher(tmp_path / "teacher-1", seed=1)
    threads = []

    def disturb(clips):
        threads.append(threading.Thread(target=service.start, args=(other,)))
        threads[0].start()

    config = run_of(tmp_path / "run", service.url, steps=500)
    clips = DisturbedClips(config.view.clip_shape, 10_000 * 40, disturb, lambda: threads[0].is_alive())
    with (
        closing(open_source(config, run="stopped")) as source,
        pytest.raises(TeacherMismatchError, match=r"409 another teacher .*start a new run"),
    ):
        train(config, source, clips)
    threads[0].join()
