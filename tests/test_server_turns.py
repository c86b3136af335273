"""Who is served when: turns between runs, room in bytes, deadlines, clients that leave, groups that keep
together."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from service_tools import ARROW, Caller, GatedTeacher, clips_by_digest, wait_until
from teacher_tools import BATCH_SIZE, load_teacher, random_clips, serving

from salt_distill.common.targets import codec
from salt_distill.teacher_server.sharing.fair_queue import FairQueue
from salt_distill.teacher_server.sharing.room import Share


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@dataclass(eq=False)
class Clip:
    run: str
    queued_s: float = 0.0
    token: str | None = None

    @property
    def share(self):
        return Share(self.token, self.run)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_a_greedy_run_gets_its_due_and_no_more(batch_size):
    queue = FairQueue()
    for run, count in (("greedy", 900), ("a", 60), ("b", 90)):
        for _ in range(count):
            queue.put(Clip(run))
    taken = []
    while "a" in {run for runs in queue._tokens.values() for run in runs}:
        taken += [clip.run for clip in queue.take(batch_size)]
    for run in ("greedy", "a", "b"):  # while all three want more, each gets a third
        assert taken.count(run) == pytest.approx(len(taken) / 3, rel=0.1)
    while queue:
        taken += [clip.run for clip in queue.take(batch_size)]
    assert (len(taken), taken.count("greedy"), taken.count("b")) == (1050, 900, 90)


def test_many_ids_of_one_token_are_one_share():
    queue = FairQueue()
    for number in range(160):
        queue.put(Clip(f"id-{number % 16}", token="greedy"))
    for _ in range(40):
        queue.put(Clip("modest", token="modest"))
    taken = [clip.token for clip in queue.take(80)]
    assert taken.count("modest") == 40


def test_a_run_that_joins_is_served_within_one_round():
    queue = FairQueue()
    for number in range(10):
        queue.put(Clip("greedy", number))
    assert [clip.queued_s for clip in queue.take(3)] == [0, 1, 2]  # one run's clips keep their order
    late = Clip("late")
    queue.put(late)
    assert late in queue.take(2)
    gone = Clip("gone")
    queue.put(gone)
    assert queue.drop(gone)
    assert not queue.drop(gone)
    assert (len(queue), queue.oldest_s()) == (6, 4)


def test_a_slow_run_beside_a_greedy_one(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside), ThreadPoolExecutor(2) as pool:
        caller, many, few = Caller(url), clips_by_digest(10 * BATCH_SIZE), clips_by_digest(BATCH_SIZE, seed=1)
        forwards = threading.Semaphore(0)
        gated.gate = SimpleNamespace(wait=lambda longest_s: forwards.acquire(timeout=longest_s))
        greedy = pool.submit(caller.statuses, list(many), many, run="greedy")
        wait_until(lambda: inside.batcher.queued_clips == 9 * BATCH_SIZE)  # one batch is before the gate
        slow = pool.submit(caller.statuses, list(few), few, run="slow")
        wait_until(lambda: inside.batcher.queued_clips == 10 * BATCH_SIZE)
        forwards.release(3)  # one batch before it came, two of both runs
        assert slow.result(timeout=20) == ["ok"] * BATCH_SIZE
        assert not greedy.done()
        forwards.release(8)
        assert greedy.result() == ["ok"] * 10 * BATCH_SIZE
        shown = {run["id"]: (run["clips_served"], run["clips_computed"]) for run in caller.json("/v1/runs")}
        assert shown == {"greedy": (40, 40), "slow": (4, 4)}


def test_a_shared_clip_is_charged_to_the_run_that_brought_it(teacher):
    with serving(teacher) as (url, _):
        caller, clips = Caller(url), clips_by_digest(3)
        caller.targets(list(clips), clips, run="first")
        caller.targets(list(clips), run="second")
        shown = {run["id"]: (run["clips_computed"], run["hit_rate"]) for run in caller.json("/v1/runs")}
        assert shown == {"first": (3, 0.0), "second": (0, 1.0)}


def test_a_runs_own_earlier_epochs_are_not_shared(teacher, tmp_path):
    """Neither from memory nor from disk, and not while they are computed."""
    with serving(teacher, cache=tmp_path) as (url, _):
        caller, clips = Caller(url), clips_by_digest(3)
        for _ in range(3):
            caller.targets(list(clips), clips, run="alone")
        [alone] = caller.json("/v1/runs")
        assert (alone["clips_served"], alone["clips_computed"], alone["clips_shared"]) == (9, 3, 0)
        assert (alone["hit_rate"], caller.counters()["shared"]) == (0.0, 0)
        caller.targets(list(clips), run="other")
        other, alone = caller.json("/v1/runs")
        assert (other["clips_shared"], other["hit_rate"], alone["hit_rate"]) == (3, 1.0, 0.0)
        assert caller.counters()["shared"] == 3
    with serving(teacher, cache=tmp_path) as (url, _):  # whose those on disk were is not known any more
        caller = Caller(url)
        caller.targets(list(clips), run="alone")
        assert (caller.counters()["from_disk"], caller.counters()["shared"]) == (3, 0)


def test_a_greedy_run_leaves_room_for_others(teacher):
    gated = GatedTeacher(teacher)
    body_bytes = 2 * random_clips(1).nbytes
    with serving(gated, max_pending_bytes=3 * body_bytes) as (url, inside), ThreadPoolExecutor(2) as pool:
        caller, clips = Caller(url), clips_by_digest(4)
        first, second, third, fourth = clips
        gated.gate.clear()
        waiting = [pool.submit(caller.statuses, [first], clips, run="greedy")]
        wait_until(lambda: inside.batcher.pending_clip(first) is not None)
        status, body = caller.ask([second, third], clips, run="greedy")
        assert status == 429
        assert "of run greedy wait for the teacher" in json.loads(body)["error"]
        waiting.append(pool.submit(caller.statuses, [fourth], clips, run="slow"))
        wait_until(lambda: inside.batcher.pending_clip(fourth) is not None)
        gated.gate.set()
        assert [future.result() for future in waiting] == [["ok"], ["ok"]]


def test_a_request_past_its_deadline_costs_no_forward(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside), ThreadPoolExecutor(1) as pool:
        caller, clips = Caller(url), clips_by_digest(BATCH_SIZE + 2)
        before, late = list(clips)[:BATCH_SIZE], list(clips)[BATCH_SIZE:]
        gated.gate.clear()
        waiting = pool.submit(caller.statuses, before, clips)
        wait_until(
            lambda: inside.batcher.pending_clip(before[0]) is not None and not inside.batcher.queued_clips
        )
        status, body = caller.ask(late, clips, headers={"X-Salt-Deadline-Ms": "300"})
        assert (status, set(json.loads(body))) == (504, {"error", "expected", "got", "hint"})
        wait_until(lambda: inside.batcher.queued_clips == 0)
        gated.gate.set()
        assert waiting.result() == ["ok"] * BATCH_SIZE
        counters = caller.counters()
        assert (counters["clips_computed"], counters["expired"], counters["abandoned"]) == (BATCH_SIZE, 1, 2)
        assert caller.statuses(late, clips, headers={"X-Salt-Deadline-Ms": "20000"}) == ["ok", "ok"]
        for wrong in ("soon", "-1", "1.5", "9" * 13):
            assert caller.ask(late, headers={"X-Salt-Deadline-Ms": wrong})[0] == 422


def test_a_client_that_leaves_takes_only_its_own_clips_with_it(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside), ThreadPoolExecutor(3) as pool:
        caller, clips = Caller(url), clips_by_digest(BATCH_SIZE + 2)
        before, (shared, alone) = list(clips)[:BATCH_SIZE], list(clips)[BATCH_SIZE:]
        gated.gate.clear()
        waiting = pool.submit(caller.statuses, before, clips)
        wait_until(
            lambda: inside.batcher.pending_clip(before[0]) is not None and not inside.batcher.queued_clips
        )
        leaves = pool.submit(caller.statuses, [shared, alone], clips, timeout=0.5)
        wait_until(lambda: inside.batcher.pending_clip(alone) is not None)
        stays = pool.submit(caller.statuses, [shared])
        with pytest.raises(TimeoutError):
            leaves.result()
        wait_until(lambda: inside.batcher.pending_clip(alone) is None)
        gated.gate.set()
        assert (waiting.result(), stays.result()) == (["ok"] * BATCH_SIZE, ["ok"])
        counters = caller.counters()
        assert (counters["clips_computed"], counters["abandoned"]) == (BATCH_SIZE + 1, 1)
        wait_until(lambda: caller.send("POST", "/v1/targets", b"", ARROW)[0] == 422)  # nothing hangs on


def test_each_worker_of_a_run_is_a_member_of_its_group(teacher):
    """A run waits for the slowest worker of the others; its own meet at every step anyway."""
    target_bytes = codec.num_bytes("float16", teacher.spec.num_tokens, teacher.spec.width)
    with serving(teacher, memory_bytes=10 * target_bytes + 1) as (url, _):
        caller = Caller(url)
        caller.post("a", step=3, slot=40, group="g")
        assert caller.post("a", step=0, slot=64, group="g", worker=1)[1] == {
            "wait": False,
            "slowest_slot": 64,
            "window_clips": 10,
            "members": 2,
        }
        caller.post("b", step=2, slot=40, group="g")
        assert caller.post("b", step=0, slot=45, group="g", worker=1)[1] == {
            "wait": False,
            "slowest_slot": 40,
            "window_clips": 10,
            "members": 4,
        }
        assert caller.post("a", step=0, slot=64, group="g", worker=1)[1]["wait"]
        assert [run["progress"]["step"] for run in caller.json("/v1/runs")] == [
            3,
            2,
        ]  # the first workers' reports are shown
        caller.post("a", step=0, slot=50, group="g", worker=1)
        caller.post("b", step=3, slot=60, group="g")
        assert (
            caller.post("b", step=3, slot=60, group="g")[1]["slowest_slot"] == 40
        )  # a's first worker, not b's second
        caller.post("a", step=0, slot=0, worker=0)
        caller.post("a", step=0, slot=0, worker=1)
        assert caller.post("b", step=3, slot=60, group="g")[1] == {
            "wait": False,
            "slowest_slot": 60,
            "window_clips": 10,
            "members": 2,
        }


def test_a_group_keeps_together(teacher):
    target_bytes = codec.num_bytes("float16", teacher.spec.num_tokens, teacher.spec.width)
    with serving(teacher, memory_bytes=10 * target_bytes + 1, group_timeout_s=0.6) as (url, _):
        caller = Caller(url)
        assert caller.post("alone", step=9, slot=900) == (
            200,
            {"wait": False, "slowest_slot": None, "window_clips": 10, "members": 0},
        )
        assert caller.post("a", step=1, slot=4, group="g")[1] == {
            "wait": False,
            "slowest_slot": 4,
            "window_clips": 10,
            "members": 1,
        }
        assert (
            caller.post("b", step=3, slot=14, group="g")[1]["wait"] is False
        )  # ten clips ahead: memory has them
        ahead = {"step": 4, "slot": 15, "group": "g"}
        assert caller.post("b", **ahead)[1] == {
            "wait": True,
            "slowest_slot": 4,
            "window_clips": 10,
            "members": 2,
        }
        assert caller.post("c", step=9, slot=99, group="other")[1]["wait"] is False
        assert {run["id"]: run["skew_clips"] for run in caller.json("/v1/runs")} == {
            "a": 0,
            "b": 11,
            "c": 0,
            "alone": None,
        }
        caller.post("a", step=2, slot=5, group="g")
        assert caller.post("b", **ahead)[1]["wait"] is False  # the slowest went on
        caller.post("b", step=5, slot=16, group="g")
        wait_until(
            lambda: caller.post("b", step=5, slot=16, group="g")[1]["wait"] is False
        )  # a is silent, so it has left
        assert caller.post("a", step=2, slot=5, group="g")[1]["members"] == 2
        assert caller.post("a", step=2, slot=5)[1]["members"] == 0  # a report without the group leaves it
        assert caller.post("b", step=6, slot=50, group="g")[1] == {
            "wait": False,
            "slowest_slot": 50,
            "window_clips": 10,
            "members": 1,
        }
        assert caller.post("b", step=6, slot=50, group="two words")[0] == 422
