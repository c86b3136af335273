"""Several replicas of one teacher, and its targets on disk: each distinct clip still costs one forward."""

import asyncio
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pyarrow as pa
import pytest
from service_tools import Caller, GatedTeacher, clips_by_digest, wait_until
from teacher_tools import BATCH_SIZE, load_teacher, serving

from salt_distill.common.config import ServiceConfig
from salt_distill.common.targets import codec
from salt_distill.common.targets.cache_file import CacheFile
from salt_distill.common.targets.growing_cache import GrowingCache
from salt_distill.common.targets.locks import one_at_a_time
from salt_distill.common.targets.manifest import CacheSpec
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.teacher_server.board.board import Board
from salt_distill.teacher_server.http.replica import ReplicaContext
from salt_distill.teacher_server.http.service import board_arguments
from salt_distill.teacher_server.sharing import disk


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@contextmanager
def replica(teacher, board, **service):
    """A caller of one replica, and its insides."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = ReplicaContext(board=board, url=f"http://127.0.0.1:{port}", buckets=2)
    with serving(teacher, port=port, context=context, **service) as (url, inside):
        yield Caller(url), inside


@pytest.fixture
def board(teacher):
    return Board(**board_arguments(teacher.spec, ServiceConfig()))


def test_two_replicas_compute_each_clip_once(teacher, board):
    with replica(teacher, board) as (one, _), replica(teacher, board) as (other, _):
        clips = clips_by_digest(8)
        assert one.statuses(list(clips)[:4], clips) == ["ok"] * 4
        _, rows = other.targets(list(clips), clips, run="second")  # half of it is the first one's
        assert [row.status for row in rows] == ["ok"] * 8
        for row, clip in zip(rows, clips.values(), strict=True):
            assert row.encoded.checksum == codec.encode(teacher.forward(clip[None]), "float16")[0].checksum
        assert one.statuses(list(clips)) == ["ok"] * 8  # and without bytes, from both
        counters = one.counters()
        assert (counters["clips_computed"], counters["clips_served"], counters["replicas"]) == (8, 20, 2)
        assert (counters["passed_on"], counters["need_clip"]) == (8, 0)
        assert other.counters()["clips_served"] == 20  # either replica speaks for both
        assert {
            run["id"]: (run["clips_served"], run["clips_computed"]) for run in other.json("/v1/runs")
        } == {
            "test": (12, 4),
            "second": (8, 4),
        }


def test_a_clip_in_flight_on_another_replica(teacher, board):
    gated = GatedTeacher(teacher)
    with (
        replica(gated, board) as (one, inside),
        replica(teacher, board) as (other, _),
        ThreadPoolExecutor(2) as pool,
    ):
        clips = clips_by_digest(BATCH_SIZE)
        gated.gate.clear()
        first = pool.submit(one.statuses, list(clips), clips)
        wait_until(lambda: inside.batcher.pending_clip(next(iter(clips))) is not None)
        second = pool.submit(other.statuses, list(clips))
        wait_until(lambda: inside.batcher.pending_clip(next(iter(clips))).num_waiting == 2)
        gated.gate.set()
        assert first.result() == second.result() == ["ok"] * BATCH_SIZE
        assert one.counters()["clips_computed"] == BATCH_SIZE


def test_leases_hold_over_replicas(teacher, board):
    with (
        replica(teacher, board) as (one, inside),
        replica(teacher, board) as (other, _),
        ThreadPoolExecutor(1) as pool,
    ):
        clips = clips_by_digest(4)
        a, b, c, d = clips
        assert one.statuses([a, b]) == ["need_clip"] * 2
        second = pool.submit(other.statuses, [a, b])
        wait_until(lambda: inside.leases.num_waiters == 2)
        assert other.statuses([a, b], clips) == ["ok"] * 2  # the lease's holder may upload anywhere
        assert second.result() == ["ok"] * 2
        assert one.statuses([c]) == ["need_clip"]
        header, rows = other.targets([c, d])  # d is this client's to upload, so it does not wait for c
        assert [row.status for row in rows] == ["need_clip"] * 2
        assert header.leased == (0,)
        assert one.counters()["need_clip"] == 4  # who was told to upload d left the line for c


def test_a_replica_that_joins_finds_what_the_others_have(teacher, board):
    with ExitStack() as stack:
        one, _ = stack.enter_context(replica(teacher, board))
        clips = clips_by_digest(6)
        assert one.statuses(list(clips), clips) == ["ok"] * 6
        other, _ = stack.enter_context(replica(teacher, board))
        assert other.statuses(list(clips)) == ["ok"] * 6
        assert one.counters()["clips_computed"] == 6


def test_a_replica_that_dies_loses_its_clips_and_no_answer(teacher, board):
    clips = clips_by_digest(6)
    with replica(teacher, board) as (other, _):
        asyncio.run(board.claim("http://127.0.0.1:9", list(clips)[:4]))  # nobody listens there
        assert other.statuses(list(clips), clips) == ["ok"] * 6
        counters = other.counters()
        assert (counters["clips_computed"], counters["replicas"]) == (6, 1)
        assert set(asyncio.run(board.claim("http://another", list(clips)))) == {
            f"http://127.0.0.1:{other.parts.port}"
        }


@contextmanager
def sick_replica(pause_s):
    """The URL of one that answers with bytes without end, and how many it could send."""
    sent = []

    def answer(listener):
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
            while True:
                time.sleep(pause_s)
                sent.append(connection.send(bytes(1 if pause_s else 1 << 20)))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", sent
        thread.join()


@pytest.mark.parametrize("pause_s", [0, 0.05])
def test_a_replica_whose_answer_has_no_end_is_lost(pause_s, teacher, board, caplog):
    clips = clips_by_digest(6)
    with (
        replica(teacher, board, body_timeout_s=1) as (one, _),
        sick_replica(pause_s) as (sick, sent),
    ):
        asyncio.run(board.claim(sick, list(clips)[:4]))
        began = time.monotonic()
        assert one.statuses(list(clips), clips) == ["ok"] * 6
        assert time.monotonic() - began < 10
        assert one.counters()["clips_computed"] == 6
    assert sum(sent) < 50_000_000
    assert ("TimeoutError" if pause_s else "answered with more than") in caplog.text


def test_equal_rows_travel_between_replicas_once(teacher, board):
    (digest, clip), *_ = clips_by_digest(1).items()
    with replica(teacher, board) as (one, _), replica(teacher, board) as (other, _):
        assert one.statuses([digest], {digest: clip}) == ["ok"]
        _, rows = other.targets([digest] * 100)
        expected = codec.encode(teacher.forward(clip[None]), "float16")[0].checksum
        assert [(row.status, row.encoded.checksum) for row in rows] == [("ok", expected)] * 100
        counters = one.counters()
        assert counters["passed_on"] == 1
        assert counters["clips_served"] == 101
        assert counters["clips_computed"] + counters["coalesced"] + counters["from_memory"] == 101


@contextmanager
def slow_replica(num_bytes, go_on):
    """The URL of one that sends so many bytes of an answer, and ends when it may go on."""

    def answer(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(num_bytes))
            assert go_on.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_answers_of_other_replicas_take_room_as_they_come(teacher, board):
    clips, others = clips_by_digest(100), clips_by_digest(40, seed=1)
    room, go_on = sum(clip.nbytes for clip in others.values()), threading.Event()
    with (
        replica(teacher, board, max_pending_bytes=room + 50_000) as (one, inside),
        slow_replica(60_000, go_on) as slow,
        ThreadPoolExecutor(1) as pool,
    ):
        asyncio.run(board.join(slow, list(clips)))
        asked = pool.submit(one.statuses, list(clips), run="a")
        wait_until(lambda: inside.room._requests.total() > 60_000)
        assert one.ask(list(others), others, run="b")[0] == 429
        assert one.counters()["replicas_lost"] == 0
        go_on.set()  # it ends in the middle of its answer: lost
        assert asked.result() == ["need_clip"] * 100
        assert one.statuses(list(others), others, run="b") == ["ok"] * 40
        assert not inside.room._requests
        assert one.counters()["replicas_lost"] == 1


def test_targets_outlive_the_service_on_disk(teacher, tmp_path, caplog):
    clips = clips_by_digest(6)
    with serving(teacher, cache=tmp_path, memory_bytes=0) as (url, _):
        caller = Caller(url)
        assert caller.statuses(list(clips), clips) == ["ok"] * 6
        assert caller.statuses(list(clips)) == ["ok"] * 6  # not sealed yet, not in memory
        assert (
            caller.statuses(list(clips), dtype="int8", clips=clips) == ["ok"] * 6
        )  # another rounding is not kept, and the log says so
        counters = caller.counters()
        assert (counters["clips_computed"], counters["from_disk"], counters["disk_clips"]) == (12, 6, 6)
        assert "got requests for int8 targets, and the target cache has float16" in caplog.text
    assert [path.name for path in (tmp_path / "segments").iterdir()] == [
        next((tmp_path / "segments").glob("*-0.arrow")).name
    ]
    cache = TargetCache(tmp_path)
    assert len(cache) == 6
    with serving(GatedTeacher(teacher), cache=tmp_path) as (url, _):
        caller = Caller(url)
        _, rows = caller.targets(list(clips))
        for row in rows:
            assert row.encoded.checksum == cache.find(row.clip_digest).encoded.checksum
        counters = caller.counters()
        assert (counters["clips_computed"], counters["from_disk"], counters["clips_served"]) == (0, 6, 6)


def test_a_damaged_target_on_disk_is_computed_again(teacher, tmp_path, caplog):
    clips = clips_by_digest(2)
    with serving(teacher, cache=tmp_path) as (url, _):
        _, rows = Caller(url).targets(list(clips), clips)
    [segment] = (tmp_path / "segments").iterdir()
    whole = bytearray(segment.read_bytes())
    whole[whole.find(bytes(rows[0].encoded.target)[:64])] ^= 1
    segment.write_bytes(whole)
    with serving(teacher, cache=tmp_path) as (url, _):
        caller = Caller(url)
        assert caller.statuses(list(clips)) == ["need_clip", "ok"]
        _, again = caller.targets(list(clips), clips)
        assert [row.encoded.checksum for row in again] == [row.encoded.checksum for row in rows]
        assert caller.counters()["disk_corrupt"] == 2  # it was looked for twice
    assert f"clip {rows[0].clip_digest.hex()[:12]}" in caplog.text
    with serving(teacher, cache=tmp_path) as (url, _):
        assert Caller(url).statuses(list(clips)) == ["ok", "ok"]


def test_a_disk_that_is_full_costs_no_answer(teacher, tmp_path, caplog):
    with serving(teacher, cache=tmp_path, segment_bytes=1) as (url, _):
        caller, clips = Caller(url), clips_by_digest(2)
        (tmp_path / "segments").rename(tmp_path / "away")
        (tmp_path / "segments").write_text("in the way")
        assert caller.statuses(list(clips), clips) == ["ok"] * 2
        wait_until(lambda: caller.counters()["disk_not_written"] == 2)
        (tmp_path / "segments").unlink()
        (tmp_path / "away").rename(tmp_path / "segments")
    assert "serving goes on" in caplog.text


def test_no_answer_waits_for_a_write(teacher, tmp_path):
    with serving(teacher, cache=tmp_path, segment_bytes=1) as (url, _):
        caller, clips = Caller(url), clips_by_digest(4)
        first, others = (dict(list(clips.items())[part]) for part in (slice(2), slice(2, 4)))
        with one_at_a_time(tmp_path / "segments"):  # another writer takes long: so does this one's segment
            assert caller.statuses(list(first), first) == ["ok"] * 2
            assert caller.statuses(list(others), others) == ["ok"] * 2
            assert caller.statuses(list(clips)) == ["ok"] * 4


def test_a_disk_that_hangs_delays_one_answer(teacher, tmp_path, caplog, monkeypatch):
    clips, answers = clips_by_digest(2), threading.Event()
    with serving(teacher, cache=tmp_path, memory_bytes=0) as (url, _):
        assert Caller(url).statuses(list(clips), clips) == ["ok"] * 2
    with serving(teacher, cache=tmp_path, memory_bytes=0) as (url, _):
        caller = Caller(url)
        monkeypatch.setattr(disk, "_MOST_WAIT_S", 0.2)
        read = CacheFile.undamaged
        monkeypatch.setattr(
            CacheFile, "undamaged", lambda file, number: answers.wait(60) and read(file, number)
        )
        assert caller.statuses(list(clips), clips) == ["ok"] * 2
        monkeypatch.setattr(disk, "_MOST_WAIT_S", 60)
        assert caller.statuses(list(clips), clips) == ["ok"] * 2  # at once
        counters = caller.counters()
        assert (counters["from_disk"], counters["disk_not_read"], counters["clips_computed"]) == (0, 4, 4)
        answers.set()
        wait_until(lambda: caller.statuses(list(clips)) == ["ok"] * 2)
        assert caller.counters()["from_disk"] == 2
    assert "its clips are computed" in caplog.text


def test_a_cache_of_another_teacher_is_refused(teacher, tmp_path):
    spec = CacheSpec(
        teacher=teacher.spec,
        target_dtype="float16",
        shape=(teacher.spec.num_tokens, teacher.spec.width),
    )
    GrowingCache(tmp_path, spec, segment_bytes=1)
    other = load_teacher(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="got a cache with fingerprint="), serving(other, cache=tmp_path):
        pass
    with (
        pytest.raises(ValueError, match="got a cache with target_dtype=float16, expected int8"),
        serving(teacher, cache=tmp_path, cache_dtype="int8"),
    ):
        pass


def test_two_writers_share_a_folder(teacher, tmp_path):
    spec = CacheSpec(
        teacher=teacher.spec,
        target_dtype="float16",
        shape=(teacher.spec.num_tokens, teacher.spec.width),
    )
    size = codec.num_bytes("float16", *spec.shape)
    clips = clips_by_digest(5)
    encoded = {
        digest: codec.encode(teacher.forward(clip[None]), "float16")[0] for digest, clip in clips.items()
    }
    one, other = (GrowingCache(tmp_path, spec, segment_bytes=2 * size) for _ in range(2))
    a, b, c, d, e = clips
    one.add({a: encoded[a], b: encoded[b]})  # sealed: it has its size
    other.add({c: encoded[c], d: encoded[d], b: encoded[b]})
    one.add({e: encoded[e]})
    assert one.find(e).checksum == encoded[e].checksum
    assert (other.find(a).checksum, other.find(e)) == (encoded[a].checksum, None)  # e is in no segment yet
    one.seal()
    assert one.find(d).checksum == encoded[d].checksum
    assert len(TargetCache(tmp_path)) == 5  # b was met by both, and is kept once
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "segments"]
    with pa.ipc.open_file(pa.memory_map(str(next((tmp_path / "segments").iterdir())))) as plain:
        assert plain.schema.names == ["clip_digest", "key", "view", "target", "scale", "checksum"]


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_tokens_are_cut_once_wherever_a_request_arrives(teacher, board, dtype):
    clips = clips_by_digest(6)
    numbers = np.random.default_rng(0)
    expected = {digest: codec.encode(teacher.forward(clip[None]), dtype)[0] for digest, clip in clips.items()}
    with replica(teacher, board) as (one, _), replica(teacher, board) as (other, _):
        assert (
            one.statuses(list(clips)[:3], clips, dtype=dtype) == ["ok"] * 3
        )  # the others are the second one's
        for caller in (other, one, other):
            num_tokens = int(numbers.integers(1, teacher.spec.num_tokens + 1))
            token_idx = np.sort(numbers.choice(teacher.spec.num_tokens, num_tokens, replace=False))
            _, rows = caller.targets(list(clips), clips, dtype=dtype, token_idx=token_idx)
            for row in rows:
                cut = codec.take_tokens(
                    expected[row.clip_digest], token_idx, num_tokens=teacher.spec.num_tokens
                )
                codec.verify(row.encoded, dtype, num_tokens=num_tokens, width=teacher.spec.width)
                assert row.encoded.checksum == cut.checksum
