"""What one client can do to the others: room, answers, leases, reports, heads without end, web pages."""

import asyncio
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pyarrow as pa
import pytest
from access_tools import HEAD, JSON, raw
from service_tools import ARROW, Caller, clips_by_digest, wait_until
from teacher_tools import BATCH_SIZE, load_teacher, serving

from salt_distill.common.config import ServiceConfig
from salt_distill.common.metrics import ServiceMetrics
from salt_distill.common.protocol import Header, Progress, Route
from salt_distill.common.targets import wire
from salt_distill.common.targets.codec import EncodedTarget
from salt_distill.teacher_server.board import groups
from salt_distill.teacher_server.board.board import Board
from salt_distill.teacher_server.board.board_file import BoardFile
from salt_distill.teacher_server.http.listener import MAX_HEAD_BYTES
from salt_distill.teacher_server.http.replica import ReplicaContext
from salt_distill.teacher_server.http.service import board_arguments, build_app
from salt_distill.teacher_server.sharing.room import BusyError, Room, Share


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture(scope="module")
def url(teacher):
    with serving(teacher, body_timeout_s=1.0) as (url, _):
        yield url


def post(url, path, body, headers=JSON):
    status, _, answer = Caller(url).send("POST", path, body, headers)
    return status, answer


LONE_SURROGATE = '{"step": 1, "slot": 1, "config": {"name": "\\ud800"}}'
DEEP = '{"step": 1, "slot": 1, "config": {"a": ' + 20_000 * "[" + 20_000 * "]" + "}}"


@pytest.mark.parametrize(
    "body",
    [
        '{"step": 1' + 400 * "0" + ', "slot": 1}',
        '{"step": 1, "slot": 9007199254740993}',
        '{"step": 1, "slot": 1, "loss": 1.7e308}',
        '{"step": 1, "slot": 1, "loss": NaN}',
        '{"step": 1, "slot": 1, "config": {"lr": 1e999}}',
        '{"step": 1, "slot": 1, "worker": 1000000}',
        LONE_SURROGATE,
        DEEP,
        "[" * 50_000,
        "{",
    ],
    ids=lambda body: body[:40],
)
def test_a_report_that_others_could_not_read_is_refused_at_the_door(url, body):
    status, answer = post(url, "/v1/runs/odd/progress", body)
    assert status == 422, answer
    assert set(json.loads(answer)) == {"error", "expected", "got", "hint"}
    caller = Caller(url)
    assert [caller.send("GET", path)[0] for path in ("/metrics", "/v1/runs", "/v1/runs/odd")] == [
        200,
        200,
        404,
    ]


def test_a_report_is_bounded_in_size_and_time(url):
    assert post(url, "/v1/runs/big/progress", b" " * 70_000)[0] == 413
    head = "POST /v1/runs/slow/progress HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer, seconds = raw(url, f"{head}Content-Length: 100\r\n\r\n{{".encode(), wait_s=8)
    assert answer.startswith(b"HTTP/1.1 408")
    assert seconds < 6


def test_a_web_page_elsewhere_changes_nothing(url):
    caller = Caller(url)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for path in (Route.STOP, Route.DRAIN, "/v1/runs/a/progress"):
        for headers in ({}, form, {"Content-Type": "text/plain"}):
            assert post(url, path, b"{}", headers)[0] == 415, (path, headers)
        for origin in ("https://evil.example", "null", f"http://{caller.parts.hostname}:1"):
            assert post(url, path, b"{}", {**JSON, "Origin": origin})[0] == 403, (path, origin)
    ours = f"http://{caller.parts.netloc}"
    assert post(url, "/v1/runs/a/progress", b'{"step": 1, "slot": 1}', {**JSON, "Origin": ours})[0] == 200
    for host, status in (
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("teacher", 200),
        ("teacher.pod.cluster.local", 200),
    ):
        assert caller.send("GET", "/v1/teacher", headers={"Host": host})[0] == status, host
    for origin in ("http://[", "http://]"):  # no URLs
        assert post(url, "/v1/runs/a/progress", b"{}", {**JSON, "Origin": origin})[0] == 403


def test_a_service_without_tokens_answers_to_the_names_that_it_is_given(teacher):
    with serving(teacher, hosts=("Teacher.Example",)) as (url, _):
        for host, status in (("teacher.example:80", 200), ("other.example", 403)):
            assert Caller(url).send("GET", "/v1/teacher", headers={"Host": host})[0] == status, host


def test_pages_load_nothing_from_elsewhere(url):
    for path in ("/", "/docs"):
        status, headers, body = Caller(url).send("GET", path)
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"src=" not in body
        assert b"https://" not in body
    assert b"/v1/targets" in body  # the last one is the contract
    assert b"X-Salt-Deadline-Ms" in body
    summaries = b" ".join(re.findall(rb"<summary>(.*?)</summary>", body))
    assert b"what the service has served over the last hour, all replicas together." in summaries
    assert b"``" not in summaries
    _, headers, _ = Caller(url).send("GET", "/v1/teacher")
    assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_a_head_without_end_is_cut(teacher):
    board = Board(**board_arguments(teacher.spec, ServiceConfig()))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        inner = f"http://127.0.0.1:{listening.getsockname()[1]}"
        context = ReplicaContext(board=board, url=inner, listener=listening)
        with serving(teacher, context=context) as (url, _):
            endless = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: " + b"a" * (2 * MAX_HEAD_BYTES)
            answer, _ = raw(inner, endless, wait_s=5)
            assert answer.startswith(b"HTTP/1.1 431")
            assert b'"error"' in answer
            whole = {f"X-{number}": "a" * 8000 for number in range(9)}
            assert Caller(url).send("GET", "/v1/teacher", headers=whole)[0] == 431
            few = {"X-A": "a" * 8000}
            assert Caller(url).send("GET", "/v1/teacher", headers=few)[0] == 200


def test_bytes_that_are_only_announced_take_no_room(teacher):
    clips = clips_by_digest(1)
    with serving(teacher, max_pending_bytes=100_000) as (url, _), ExitStack() as stack:
        caller = Caller(url)
        for _ in range(4):
            connection = stack.enter_context(
                socket.create_connection((caller.parts.hostname, caller.parts.port))
            )
            connection.sendall(f"{HEAD}{Header.RUN}: a\r\nContent-Length: 90000\r\n\r\n".encode())
        time.sleep(0.2)  # they have arrived
        assert caller.statuses(list(clips), clips, run="b") == ["ok"]


def test_room_is_shared_by_tokens_and_then_by_runs():
    room = Room(1000, ServiceMetrics())
    for number in range(16):  # as many ids as one likes are one token's share
        room.enter(Share("greedy", f"run-{number}")).take(45)
    modest = room.enter(Share("modest", "run"))
    modest.take(250)
    with pytest.raises(BusyError, match="of the token of greedy"):
        room.enter(Share("greedy", "another")).take(20)


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_a_target_that_two_answers_hold_counts_until_the_last_one_ends(first_to_end):
    async def hold_and_read() -> None:
        room = Room(1000, ServiceMetrics())
        target, other = (EncodedTarget(target=bytes(size), scale=None, checksum=0) for size in (700, 400))
        ours = [
            await room.hold_targets(Share(None, run), [target], copied_bytes=0, timeout_s=1)
            for run in ("a", "b")
        ]
        ours[first_to_end].release()
        with pytest.raises(BusyError):
            await room.hold_targets(Share(None, "c"), [other], copied_bytes=0, timeout_s=0.05)
        ours[1 - first_to_end].release()
        held = await room.hold_targets(Share(None, "c"), [other], copied_bytes=0, timeout_s=1)
        assert room._answers == {"run c": 400}
        held.release()
        assert (room._answers, room._held, room._held_bytes) == ({}, {}, 0)

    asyncio.run(hold_and_read())


def test_a_request_that_is_cancelled_as_its_answer_finds_room_takes_none(teacher):
    [digest] = clips = clips_by_digest(1)
    row = wire.RequestRow(clip_digest=digest, clip=clips[digest].tobytes())
    body = b"".join(wire.write_request("float16", [row]))

    async def ask() -> None:
        app = build_app(teacher, ServiceConfig())
        async with app.router.lifespan_context(app):
            room = app.state.service.room
            hold_targets = room.hold_targets

            async def hold_and_cancel(*arguments, **options):
                held = await hold_targets(*arguments, **options)
                request.cancel()
                return held

            room.hold_targets = hold_and_cancel
            while not app.state.service.ready:
                await asyncio.sleep(0.01)
            messages = iter([{"type": "http.request", "body": body}])

            async def receive():
                message = next(messages, None)
                return message if message is not None else await asyncio.Event().wait()

            async def send(message):
                """Nobody reads."""

            headers = [(b"content-type", ARROW["Content-Type"].encode()), (b"host", b"127.0.0.1")]
            scope = {
                "type": "http", "method": "POST", "path": "/v1/targets", "raw_path": b"/v1/targets",
                "query_string": b"", "headers": headers, "server": ("127.0.0.1", 80), "scheme": "http",
                "client": ("127.0.0.1", 1), "http_version": "1.1", "root_path": "", "extensions": {},
            }  # fmt: skip
            request = asyncio.create_task(app(scope, receive, send))
            with suppress(asyncio.CancelledError):
                await request
            assert request.cancelled()
            assert (room._held, room._held_bytes) == ({}, 0)

    asyncio.run(ask())


def test_an_answer_that_is_not_read_ends_and_counts(teacher):
    [digest] = clips_by_digest(1)
    clips = clips_by_digest(1)
    with serving(teacher, body_timeout_s=1.0, max_request_clips=30_000) as (url, inside):
        caller = Caller(url)
        assert caller.statuses([digest], clips) == ["ok"]
        rows = [wire.RequestRow(clip_digest=digest)] * 8_000
        body = b"".join(wire.write_request("float16", rows))
        with socket.socket() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.connect((caller.parts.hostname, caller.parts.port))
            unread.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: inside.room._held)
            assert caller.counters()["open_requests"] == 1
            [held] = inside.room._held.values()  # thousands of rows are views of one target
            assert inside.room._held_bytes == held.target.num_bytes
            wait_until(lambda: caller.counters()["open_requests"] == 0, seconds=20)
        assert not inside.room._held
        assert caller.statuses([digest]) == ["ok"]


def test_tokens_of_more_copies_than_there_is_room_for_are_refused(teacher):
    [digest] = clips = clips_by_digest(1)
    with serving(teacher, max_pending_bytes=10_000) as (url, _):
        caller = Caller(url)
        assert caller.statuses([digest], clips) == ["ok"]
        subsets = [[index for index in range(8) if number >> index & 1] for number in range(1, 256)]
        rows = [wire.RequestRow(clip_digest=digest, token_idx=np.array(subset)) for subset in subsets]
        body = b"".join(wire.write_request("float16", rows))
        assert caller.send("POST", "/v1/targets", body, ARROW)[0] == 413


def test_token_lists_longer_than_a_target_are_refused_before_they_are_copied(teacher, url):
    [digest] = clips_by_digest(1)
    schema = pa.schema(
        [
            pa.field("clip_digest", pa.binary(32), nullable=False),
            pa.field("clip", pa.large_binary()),
            pa.field("token_idx", pa.list_(pa.uint16())),
        ],
        metadata={"salt.protocol": "1", "salt.target_dtype": "float16"},
    )
    values = pa.array(np.zeros(1_000_000, dtype=np.uint16))
    lists = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    batch = pa.RecordBatch.from_arrays(
        [pa.array([digest], pa.binary(32)), pa.nulls(1, pa.large_binary()), lists], schema=schema
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    status, answer = post(url, "/v1/targets", sink.getvalue().to_pybytes(), ARROW)
    assert (status, f"at most the teacher's {teacher.spec.num_tokens}" in answer.decode()) == (422, True)


def test_askers_that_never_upload_delay_nobody_for_long(teacher):
    lease_s = 0.5
    (first, second), clips = clips_by_digest(2), clips_by_digest(2)
    with serving(teacher, lease_s=lease_s) as (url, inside), ThreadPoolExecutor(12) as pool:
        caller = Caller(url)
        attackers = [f"attacker-{number}" for number in range(12)]
        asking = [pool.submit(caller.statuses, [first], run=attackers[0])]
        wait_until(lambda: len(inside.leases) == 1)
        asking += [pool.submit(caller.statuses, [first], run=run) for run in attackers[1:]]
        wait_until(lambda: inside.leases.num_waiters == 11)
        started = time.monotonic()
        assert caller.statuses([first], run="victim") == ["need_clip"]
        assert time.monotonic() - started < 4 * lease_s  # not twelve leases
        assert caller.statuses([first], clips, run="victim") == ["ok"]
        assert caller.statuses([second], run=attackers[0]) == ["need_clip"]  # it has let a lease lapse
        started = time.monotonic()
        assert caller.statuses([second], run="victim") == ["need_clip"]
        assert time.monotonic() - started < lease_s / 2
        for future in asking:
            future.result()


class StoppedBoard(Board):
    """One whose process can be stopped: it answers nothing, and refuses nothing."""

    is_stopped = False


def _stoppable(name):
    async def method(self, *values, **named):
        while self.is_stopped:
            await asyncio.sleep(0.05)
        return await getattr(Board, name)(self, *values, **named)

    return method


for _name in ("claim", "served", "runs", "post", "metrics", "knows"):
    setattr(StoppedBoard, _name, _stoppable(_name))


def test_a_stopped_board_stops_no_answer(teacher):
    board = StoppedBoard(**board_arguments(teacher.spec, ServiceConfig()))
    with serving(teacher, context=ReplicaContext(board=board, url="http://127.0.0.1:9")) as (url, _):
        caller, clips = Caller(url), clips_by_digest(2 * BATCH_SIZE)
        board.is_stopped = True
        started = time.monotonic()
        assert set(caller.statuses(list(clips)[:BATCH_SIZE], clips)) == {"ok"}
        assert set(caller.statuses(list(clips)[BATCH_SIZE:], clips)) == {"ok"}
        assert time.monotonic() - started < 10
        assert caller.send("GET", "/readyz")[0] == 200
        assert caller.json("/v1/teacher")["counters"]["clips_served"] == 2 * BATCH_SIZE
        status, headers, _ = caller.send("GET", "/v1/runs")
        assert (status, float(headers["Retry-After"]) > 0) == (503, True)
        board.is_stopped = False
        wait_until(lambda: caller.send("GET", "/v1/runs")[0] == 200)


@contextmanager
def a_board(**limits):
    yield Board(**{"max_runs": 10, "group_timeout_s": 60, "window_clips": 100, "teacher": "t", **limits})


def test_many_ids_of_one_token_remove_its_own_runs():
    with a_board() as board:

        async def fill():
            for number in range(3):
                await board.post(f"good-{number}", Progress(step=1, slot=1), token="good")
            for number in range(1500):
                await board.post(f"many-{number}", Progress(step=1, slot=1), token="limited")
            return {run.id for run in await board.runs()}

        shown = asyncio.run(fill())
        assert len(shown) == 10
        assert {f"good-{number}" for number in range(3)} < shown


def test_many_workers_of_a_group_cost_the_others_nothing(monkeypatch):
    monkeypatch.setattr(groups, "_MAX_MEMBERS", 50)
    with a_board() as board:

        async def fill():
            await board.post("good", Progress(step=1, slot=7, group="g"), token="good")
            for worker in range(200):
                await board.post("many", Progress(step=1, slot=1, group="h", worker=worker), token="limited")
            return await board.post("good", Progress(step=2, slot=8, group="g"), token="good")

        assert asyncio.run(fill()).members == 1
        assert len(board._groups.slots("h")) == 50


def test_a_link_in_place_of_the_boards_partial_file_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("of somebody else")
    for name in (".partial-board.jsonl", ".board.jsonl.partial"):
        (tmp_path / name).symlink_to(other)
    BoardFile(tmp_path / "board.jsonl", "t").start([])
    assert other.read_text() == "of somebody else"
    assert (tmp_path / "board.jsonl").read_text().startswith('{"format"')


def test_a_cache_that_replicas_share_is_counted_once(teacher, tmp_path):
    clips = clips_by_digest(4)
    with serving(teacher, cache=tmp_path / "cache") as (url, _):
        assert Caller(url).statuses(list(clips), clips) == ["ok"] * 4
    board = Board(**board_arguments(teacher.spec, ServiceConfig()))
    with ExitStack() as stack:
        for _ in range(2):
            context = ReplicaContext(board=board)
            url, _ = stack.enter_context(serving(teacher, context=context, cache=tmp_path / "cache"))
        assert Caller(url).counters()["disk_clips"] == 4
