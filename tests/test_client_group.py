"""What a student tells the service beside its clips: buckets, deadlines, where it is in its group."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from student_tools import open_source
from teacher_tools import VIEW, batch_of, load_teacher, random_clips, runs_on_board, serving
from train_tools import ALONE, SMALL, RandomClips, metrics_line, small_run

from salt_distill.common.config import ServiceClientConfig, StudentRun
from salt_distill.common.targets import wire
from salt_distill.student_trainer.loop import train_on
from salt_distill.student_trainer.run_directory import read_metrics
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets

CLIENT = ServiceClientConfig(request_clips=3, connections=2, timeout_s=20, retry_budget_s=20)
LINE = {
    "step": 4,
    "slot": 96,
    "loss": 0.25,
    "lr": 0.1,
    "flops": 1e12,
    "teacher_wait_ms": 2.5,
    "clips_per_s": 30.0,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


class Front:
    """Stands before the app: announces buckets, keeps what requests say, and answers progress reports with
    ``standing``."""

    def __init__(self, *, buckets: int | None = None, standing=None):
        self.buckets, self.standing = buckets, standing
        self.asked: list[tuple[dict[str, str], list[bytes]]] = []
        self.posts: list[dict] = []

    def __call__(self, app):
        async def front(scope, receive, send):
            if scope["type"] != "http":
                return await app(scope, receive, send)
            path = scope["path"]
            if path == "/v1/targets" or path.endswith("/progress"):
                body = b""
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if not message.get("more_body"):
                        break
                if path == "/v1/targets":
                    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
                    self.asked.append((headers, [row.clip_digest for row in wire.read_request(body).rows]))

                    bodies = [body]

                    async def again():
                        return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

                    return await app(scope, again, send)
                self.posts.append(json.loads(body))
                status, answer = (
                    (503, b"no")
                    if self.standing is None
                    else (200, json.dumps(self.standing(self.posts)).encode())
                )
                return await _answer(send, status, answer)
            if path == "/v1/teacher" and self.buckets is not None:
                facts = b""

                async def keep(message):
                    nonlocal facts
                    facts += message.get("body", b"")

                await app(scope, receive, keep)
                return await _answer(
                    send, 200, json.dumps({**json.loads(facts), "buckets": self.buckets}).encode()
                )
            return await app(scope, receive, send)

        return front


async def _answer(send, status: int, body: bytes) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("buckets", [None, 1, 5])
def test_a_body_holds_one_bucket_and_names_it(teacher, buckets):
    batch = batch_of(random_clips(20))
    front = Front(buckets=buckets)
    with serving(teacher, around=front) as (url, _):
        served, local = ServiceTargets(url, "float16", CLIENT, "a"), LocalTargets(teacher, "float16")
        assert torch.equal(*(source.request(batch).result(timeout=30) for source in (served, local)))
        served.close()
        local.close()
    assert {digest for _, digests in front.asked for digest in digests} == set(batch.digests)
    for headers, digests in front.asked:
        assert 1 <= len(digests) <= 3
        assert 0 < int(headers["x-salt-deadline-ms"]) <= 20_000
        if buckets == 5:
            assert {int.from_bytes(digest[:4], "big") % 5 for digest in digests} == {
                int(headers["x-salt-bucket"])
            }
        else:
            assert "x-salt-bucket" not in headers


def standing(*, wait: bool, slowest_slot: int = 0):
    return {"wait": wait, "slowest_slot": slowest_slot, "window_clips": 100, "members": 2}


def test_a_run_ahead_of_its_group_waits_before_its_next_request(teacher, caplog):
    """Also what it says of it, and that it leaves the group in the end."""
    gate = threading.Event()
    front = Front(standing=lambda posts: standing(wait=False, slowest_slot=100 if gate.is_set() else 24))
    with serving(teacher, around=front) as (url, _):
        source = ServiceTargets(url, "float16", CLIENT, "a", group="g")
        source.request(batch_of(random_clips(4)), slot=72).result(timeout=30)
        source.report(metrics_line(**LINE))
        future = source.request(
            batch_of(random_clips(4, seed=1)), slot=144
        )  # beyond the window: posted at once
        time.sleep(1.5)
        assert not future.done()
        source.report(metrics_line(**LINE | {"step": 5, "loss": 0.5}))  # the training goes on meanwhile
        before = len(front.asked)
        gate.set()
        future.result(timeout=30)
        assert len(front.asked) > before
        metrics = source.metrics()
        source.close()
    assert metrics["group_skew_clips"] == 144 - 100
    assert 1 < metrics["group_wait_s"] < 20
    assert source.counters()["group_wait_s"] == metrics["group_wait_s"]
    assert (front.posts[0]["step"], front.posts[0]["slot"]) == (0, 72)
    assert all(post["group"] == "g" for post in front.posts[:-1])
    assert "group" not in front.posts[-1]
    waiting = [post for post in front.posts[:-1] if post["slot"] == 144]
    assert (waiting[-1]["step"], waiting[-1]["loss"]) == (5, 0.5)
    assert len(waiting) < 8  # about one a second
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "group g: waiting since" in said
    assert "120 clips ahead of the slowest of 2 members" in said
    assert "continuing after" in said


def test_a_second_rank_is_held_for_its_own_part(teacher):
    front = Front(standing=lambda posts: standing(wait=False, slowest_slot=0))
    with serving(teacher, around=front) as (url, _):
        source = ServiceTargets(url, "float16", CLIENT, "a", group="g", rank=1)
        source.request(batch_of(random_clips(2)), slot=48).result(timeout=30)
        held = source.request(batch_of(random_clips(2, seed=1)), slot=120)
        while front.posts[-1]["slot"] != 120:
            time.sleep(0.01)
        assert not held.done()
        source.close()
    assert [(post["worker"], post.get("group")) for post in (front.posts[0], front.posts[-1])] == [
        (1, "g"),
        (1, None),
    ]


def test_a_fast_run_posts_once_a_second(teacher):
    front = Front(standing=lambda posts: standing(wait=False, slowest_slot=posts[-1]["slot"]))
    with serving(teacher, around=front) as (url, _):
        source = ServiceTargets(url, "float16", CLIENT, "a", group="g")
        started = time.monotonic()
        for step in range(1, 11):
            source.request(batch_of(random_clips(1)), slot=step - 1).result(timeout=30)
        elapsed_s = time.monotonic() - started
        source.close()
    assert 1 <= len(front.posts) - 1 <= 1 + elapsed_s


def test_a_board_that_fails_holds_nobody_back(teacher):
    with serving(teacher, around=Front()) as (url, _):
        source = ServiceTargets(url, "float16", CLIENT, "a", group="g")
        source.request(batch_of(random_clips(2)), slot=0).result(timeout=10)
        source.close()
        assert source.counters()["progress_failures"] == 2
        assert source.metrics() == {"group_skew_clips": 0, "group_wait_s": 0.0}


def test_closing_ends_a_wait_for_the_group(teacher):
    front = Front(standing=lambda posts: standing(wait=True))
    with serving(teacher, around=front) as (url, _):
        source = ServiceTargets(url, "float16", CLIENT, "a", group="g")
        future = source.request(batch_of(random_clips(1)), slot=500)
        while not front.posts:
            time.sleep(0.01)
        started = time.monotonic()
        source.close()
        assert time.monotonic() - started < 5
        assert isinstance(future.exception(timeout=1), ConnectionError)


class PacedClips(RandomClips):
    """Clips that come when ``may_read`` of their first slot is set, no faster than one batch in
    ``pause_s``."""

    def __init__(self, clip_shape, may_read, pause_s: float):
        super().__init__(clip_shape)
        self._may_read, self._pause_s = may_read, pause_s

    def clips(self, slots):
        self._may_read(slots.start)
        time.sleep(self._pause_s)
        return super().clips(slots)


@pytest.mark.faults  # two real runs, whose pace the machine decides
def test_students_of_one_group_share_every_forward(teacher, tmp_path):
    """Of different size, the second started later and slower. Alone the first would be the whole run ahead,
    and memory holds three batches of it."""
    size, steps, window = 30, 8, 90
    joined = threading.Event()

    def first_may_read(slot: int) -> None:
        if slot >= size:
            assert joined.wait(60)

    readers = {"first": (first_may_read, 0.0), "second": (lambda slot: None, 0.6)}
    with serving(teacher, memory_bytes=window * teacher.spec.num_tokens * teacher.spec.width * 2) as (
        url,
        inside,
    ):

        def student(name: str, width: int) -> list[dict]:
            out = tmp_path / name
            out.mkdir()
            encoder = {**SMALL["encoder"], "width": width, "num_heads": 2}
            values = {
                "out": str(out),
                "teacher_url": url,
                "view": VIEW.model_dump(),
                "encoder": encoder,
                "log_every": 1,
                "group": "g",
            }
            config = small_run(StudentRun, **values, steps=steps, client={"request_clips": 8})
            with closing(open_source(config, run=name)) as source:
                train_on(PacedClips(config.view.clip_shape, *readers[name]), [source], config, ALONE, None)
            return read_metrics(out)

        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(student, "first", 32)
            while not inside.metrics().clips_served:
                time.sleep(0.01)
            second = pool.submit(student, "second", 48)
            while sum(run["progress"] is not None for run in runs_on_board(url)) < 2:
                time.sleep(0.01)
            time.sleep(1.1)  # a run looks after its group once a second
            joined.set()
            lines = [future.result(timeout=120) for future in (first, second)]
        assert inside.metrics().clips_computed == steps * size - 1  # one is bad
    # Which of the two was ahead, and when, the machine decides; that neither ran away, the forwards above.
    assert max(line["group_skew_clips"] for run in lines for line in run) > 0
