"""The teacher service under uvicorn: routes, coalescing, leases, errors."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from service_tools import Caller, FailingTeacher, GatedTeacher, clips_by_digest, wait_until
from teacher_tools import BATCH_SIZE, VIEW, load_teacher, random_clips, serving

from salt_distill.common.protocol import ARROW_TYPE
from salt_distill.common.targets import codec, wire
from salt_distill.teacher_server.sharing.batching import HangError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture
def service(teacher):
    with serving(teacher, lease_s=0.4) as (url, inside):
        yield Caller(url), inside


def test_targets_are_the_teachers_own_bits(service, teacher):
    caller, _ = service
    clips = clips_by_digest(6)
    header, rows = caller.targets(list(clips), clips)
    assert (header.fingerprint, header.compute) == (teacher.spec.fingerprint, teacher.spec.compute)
    assert header.shape == (teacher.spec.num_tokens, teacher.spec.width)
    assert [row.clip_digest for row in rows] == list(clips)
    for row, clip in zip(rows, clips.values(), strict=True):
        expected = codec.encode(teacher.forward(clip[None]), "float16")[0]
        assert row.encoded.checksum == expected.checksum
    assert len({row.encoded.checksum for row in rows}) == 6


def test_what_the_service_says_of_itself(service, teacher):
    caller, _ = service
    facts = caller.json("/v1/teacher")
    assert facts["fingerprint"] == teacher.spec.fingerprint
    assert facts["clip_shape"] == list(VIEW.clip_shape)
    assert (facts["grid"], facts["width"], facts["batch_size"], facts["protocol"]) == (
        [2, 2, 2],
        24,
        BATCH_SIZE,
        "1",
    )
    assert facts["dtypes"] == ["float16", "bfloat16", "int8"]
    assert facts["compute"]["batch_size"] == BATCH_SIZE
    assert caller.json("/healthz") == {"alive": True}
    assert caller.json("/readyz") == {"ready": True}
    status, headers, page = caller.send("GET", "/")
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert b"https://" not in page
    assert b"http://" not in page.replace(b"http://www.w3.org/2000/svg", b"")  # a name, not a place


def test_memory_answers_the_second_asker(service):
    caller, _ = service
    clips = clips_by_digest(5)
    assert caller.statuses(list(clips), clips) == ["ok"] * 5
    assert caller.statuses(list(clips)) == ["ok"] * 5
    counters = caller.counters()
    assert (counters["clips_computed"], counters["clips_served"], counters["from_memory"]) == (5, 10, 5)
    metrics = caller.send("GET", "/metrics")[2].decode()
    assert "salt_clips_served_total 10\n" in metrics
    assert 'salt_run_clips_served_total{run="test"} 10\n' in metrics


def test_memory_is_bounded(teacher):
    target_bytes = codec.num_bytes("float16", teacher.spec.num_tokens, teacher.spec.width)
    with serving(teacher, memory_bytes=3 * target_bytes, lease_s=0.2) as (url, _):
        caller = Caller(url)
        clips = clips_by_digest(4)
        for digest, clip in clips.items():
            caller.targets([digest], {digest: clip})
        assert caller.counters()["memory_bytes"] == 3 * target_bytes
        first, *others = clips
        assert caller.statuses(others) == ["ok"] * 3
        assert caller.statuses([first]) == ["need_clip"]


def test_two_clients_with_the_same_clips_share_one_forward_each(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside), ThreadPoolExecutor(2) as pool:
        caller, clips = Caller(url), clips_by_digest(BATCH_SIZE)
        gated.gate.clear()
        both = [pool.submit(caller.targets, list(clips), clips) for _ in range(2)]
        wait_until(lambda: inside.batcher.counters.coalesced == BATCH_SIZE)
        gated.gate.set()
        checksums = [[row.encoded.checksum for row in future.result()[1]] for future in both]
        assert checksums[0] == checksums[1]
        counters = caller.counters()
        assert (counters["clips_served"], counters["clips_computed"], counters["coalesced"]) == (
            2 * BATCH_SIZE,
            BATCH_SIZE,
            BATCH_SIZE,
        )
        assert gated.batches == [1, BATCH_SIZE]  # the first one warms up


def test_a_forward_within_its_time_is_no_fault_to_another_thread(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside), ThreadPoolExecutor(1) as pool:
        gated.gate.clear()
        clips = clips_by_digest(1)
        asked = pool.submit(Caller(url).statuses, list(clips), clips)
        wait_until(lambda: inside.batcher._forward_since_s is not None)
        inside.check()
        gated.gate.set()
        assert asked.result() == ["ok"]


def test_a_teacher_that_hangs_is_not_ready_until_it_goes_on(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated, forward_timeout_s=0.3) as (url, inside), ThreadPoolExecutor(1) as pool:
        caller, clips = Caller(url), clips_by_digest(1)
        assert caller.send("GET", "/readyz")[0] == 200
        gated.gate.clear()
        asked = pool.submit(caller.statuses, list(clips), clips)
        wait_until(lambda: caller.send("GET", "/readyz")[0] == 503)
        status, _, body = caller.send("GET", "/healthz")  # so that the replica is replaced
        assert status == 500
        assert re.search(
            rb"a forward has not ended after [\d.]+ s, and service.forward_timeout_s is 0.3", body
        )
        with pytest.raises(HangError):  # as Ray Serve asks: from another thread
            inside.check()
        assert caller.counters()["forwards_hung"] == 1  # however often it was asked
        gated.gate.set()
        assert asked.result() == ["ok"]
        wait_until(lambda: caller.send("GET", "/readyz")[0] == 200)


def test_the_first_of_two_clients_leaves(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside), ThreadPoolExecutor(2) as pool:
        caller, clips = Caller(url), clips_by_digest(2)
        gated.gate.clear()
        first = pool.submit(caller.targets, list(clips), clips, timeout=0.5)
        wait_until(lambda: inside.batcher.pending_clip(next(iter(clips))) is not None)
        second = pool.submit(caller.targets, list(clips))
        with pytest.raises(TimeoutError):
            first.result()
        gated.gate.set()
        assert [row.status for row in second.result()[1]] == ["ok", "ok"]
        assert caller.counters()["clips_computed"] == 2


def test_one_forward_serves_two_roundings(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside), ThreadPoolExecutor(3) as pool:
        caller, clips = Caller(url), clips_by_digest(1)
        gated.gate.clear()
        first = pool.submit(caller.targets, list(clips), clips, "float16")
        wait_until(lambda: inside.batcher.pending_clip(next(iter(clips))) is not None)
        others = [pool.submit(caller.targets, list(clips), None, dtype) for dtype in ("int8", "bfloat16")]
        wait_until(lambda: len(inside.batcher.pending_clip(next(iter(clips))).results) == 3)
        gated.gate.set()
        assert [future.result()[0].target_dtype for future in (first, *others)] == [
            "float16",
            "int8",
            "bfloat16",
        ]
        assert caller.counters()["clips_computed"] == 1


def test_the_first_asker_uploads_and_the_second_waits(teacher):
    with serving(teacher, lease_s=10) as (url, inside), ThreadPoolExecutor(1) as pool:
        caller, clips = Caller(url), clips_by_digest(3)
        assert caller.statuses(list(clips)) == ["need_clip"] * 3
        second = pool.submit(caller.targets, list(clips))
        wait_until(lambda: inside.leases.num_waiters == 3)
        assert caller.statuses(list(clips), clips) == ["ok"] * 3
        assert [row.status for row in second.result()[1]] == ["ok"] * 3
        counters = caller.counters()
        assert (counters["clips_computed"], counters["need_clip"], counters["leases"]) == (3, 3, 0)


def test_crossing_leases_do_not_deadlock(teacher):
    with serving(teacher, lease_s=10) as (url, _):
        caller, clips = Caller(url), clips_by_digest(4)
        a, b, c, d = clips
        assert caller.statuses([a, b]) == ["need_clip"] * 2  # the one client holds a and b
        header, rows = caller.targets(
            [c, a, d, b]
        )  # the other one gets c and d, and is not kept waiting for a and b
        assert [row.status for row in rows] == ["need_clip"] * 4
        assert header.leased == (1, 3)
        started = time.monotonic()
        assert caller.statuses([a, b], clips) == ["ok"] * 2
        assert caller.statuses([c, d, a, b], {c: clips[c], d: clips[d]}) == ["ok"] * 4
        assert time.monotonic() - started < 5  # nobody waited for a lease to end
        counters = caller.counters()
        assert (counters["clips_computed"], counters["clips_served"]) == (4, 6)


def test_a_lease_whose_holder_died_goes_to_the_next(service):
    caller, _ = service
    clips = clips_by_digest(1)
    assert caller.statuses(list(clips)) == ["need_clip"]  # and never comes back
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(caller.statuses, list(clips)) for _ in range(2)]
        wait_until(lambda: any(future.done() for future in waiting))
        [done] = [future for future in waiting if future.done()]
        assert done.result() == ["need_clip"]  # one of the two is to upload, the other one waits on
        assert 0.2 < time.monotonic() - started < 5
        assert caller.statuses(list(clips), clips) == ["ok"]
        assert sorted(future.result()[0] for future in waiting) == ["need_clip", "ok"]


def test_a_bad_row_costs_that_row(service):
    caller, _ = service
    good, bad, short = clips_by_digest(3)
    clips = clips_by_digest(3)
    sent = {good: clips[good], bad: clips[good], short: clips[short][1:]}
    _, rows = caller.targets([good, bad, short], sent)
    assert [row.status for row in rows] == ["ok", "bad_digest", "bad_shape"]
    assert [row.encoded is None for row in rows] == [False, True, True]
    assert caller.counters()["refused"] == 2


def test_a_clip_twice_in_one_request(service):
    caller, _ = service
    clips = clips_by_digest(1)
    [digest] = clips
    assert caller.statuses([digest, digest], clips) == ["ok", "ok"]
    assert caller.counters()["clips_computed"] == 1


def test_only_some_tokens(service):
    caller, _ = service
    clips = clips_by_digest(1)
    [digest] = clips
    [whole] = caller.targets([digest], clips, "int8")[1]
    header, [part] = caller.targets([digest], None, "int8", token_idx=np.array([1, 6]))
    decoded = codec.decode(whole.encoded, "int8", num_tokens=header.shape[0], width=header.shape[1])
    assert torch.equal(
        codec.decode(part.encoded, "int8", num_tokens=2, width=header.shape[1]), decoded[[1, 6]]
    )


def test_errors_say_got_expected_and_hint(service, teacher):
    caller, _ = service
    arrow = {"Content-Type": ARROW_TYPE}
    body = b"".join(
        wire.write_request("float16", [wire.RequestRow(clip_digest=bytes(32), token_idx=np.array([99]))])
    )
    cases = [
        (409, body, {**arrow, "X-Salt-Teacher": "0" * 64}, teacher.spec.fingerprint),
        (415, body, {"Content-Type": "application/json"}, "application/json"),
        (422, b"nonsense", arrow, "malformed"),
        (422, body, arrow, "malformed"),
        (422, body, {**arrow, "X-Salt-Run": "a b"}, "a b"),
    ]
    for status, sent, headers, got in cases:
        answered, _, answer = caller.send("POST", "/v1/targets", sent, headers)
        assert answered == status
        problem = json.loads(answer)
        assert set(problem) == {"error", "expected", "got", "hint"}
        assert got in problem["got"]
    assert caller.send("GET", "/v1/nothing")[0] == 404
    assert caller.send("GET", "/v1/targets")[0] == 405


def test_a_body_that_is_too_large(teacher):
    with serving(teacher, max_request_bytes=5000) as (url, _):
        status, _, body = Caller(url).send("POST", "/v1/targets", bytes(5001), {"Content-Type": ARROW_TYPE})
        assert (status, json.loads(body)["expected"]) == (413, "at most 5000 bytes")
        chunked = Caller(url).send(
            "POST", "/v1/targets", iter([bytes(3000), bytes(3000)]), {"Content-Type": ARROW_TYPE}
        )
        assert chunked[0] == 413


def test_a_busy_teacher_says_when_to_come_back(teacher):
    gated = GatedTeacher(teacher)
    clip_bytes = random_clips(1).nbytes
    with (
        serving(gated, max_pending_bytes=2 * clip_bytes, retry_after_s=0.25) as (url, inside),
        ThreadPoolExecutor(1) as pool,
    ):
        caller, clips = Caller(url), clips_by_digest(2)
        first, second = clips
        gated.gate.clear()
        waiting = pool.submit(caller.statuses, [first], clips)
        wait_until(lambda: inside.batcher.pending_clip(first) is not None)
        body = b"".join(
            wire.write_request("float16", [wire.RequestRow(clip_digest=second, clip=clips[second].tobytes())])
        )
        status, headers, answer = caller.send("POST", "/v1/targets", body, {"Content-Type": ARROW_TYPE})
        assert (status, headers["Retry-After"]) == (429, "0.25")
        assert "wait for the teacher" in json.loads(answer)["error"]
        gated.gate.set()
        assert waiting.result() == ["ok"]
        wait_until(lambda: inside.batcher.pending_clip(first) is None)
        assert caller.statuses([second], clips) == ["ok"]
        assert caller.counters()["busy"] == 1


def test_a_teacher_that_fails_once(teacher):
    with serving(FailingTeacher(teacher)) as (url, _):
        caller, clips = Caller(url), clips_by_digest(2)
        rows = [wire.RequestRow(clip_digest=digest, clip=clip.tobytes()) for digest, clip in clips.items()]
        body = b"".join(wire.write_request("float16", rows))
        status, _, answer = caller.send("POST", "/v1/targets", body, {"Content-Type": ARROW_TYPE})
        assert (status, json.loads(answer)["error"]) == (500, "the teacher failed: out of memory")
        assert caller.statuses(list(clips), clips) == ["ok", "ok"]


def test_not_ready_before_the_first_forward(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside):
        inside.ready = False
        caller = Caller(url)
        status, headers, _ = caller.send("GET", "/readyz")
        assert (status, headers["Retry-After"]) == (503, "0.5")
        assert caller.send("POST", "/v1/targets", b"", {"Content-Type": ARROW_TYPE})[0] == 503
        assert caller.json("/healthz") == {"alive": True}


def test_the_board(service):
    caller, _ = service
    report = {"step": 3, "slot": 48, "loss": 0.5, "teacher_wait_ms": 1.5}
    headers = {"Content-Type": "application/json"}
    assert caller.send("POST", "/v1/runs/a/progress", json.dumps(report), headers)[0] == 200
    assert caller.send("POST", "/v1/runs/b/progress", json.dumps({**report, "step": 4}), headers)[0] == 200
    runs = caller.json("/v1/runs")
    assert [(run["id"], run["progress"]["step"], run["progress"]["loss"]) for run in runs] == [
        ("b", 4, 0.5),
        ("a", 3, 0.5),
    ]
    for wrong in (
        {**report, "colour": 1},
        {**report, "step": -1},
        {"step": 1},
        {**report, "loss": float("nan")},
    ):
        status, _, body = caller.send("POST", "/v1/runs/a/progress", json.dumps(wrong), headers)
        assert (status, set(json.loads(body))) == (422, {"error", "expected", "got", "hint"})
    assert caller.json("/v1/runs")[1]["progress"]["step"] == 3
