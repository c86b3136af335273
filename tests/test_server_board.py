"""The board: runs and counters over restarts, damaged files and lost replicas; curves of bounded size."""

import asyncio
import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from access_tools import JSON
from service_tools import Caller, GatedTeacher, clips_by_digest, wait_until
from student_tools import open_source
from teacher_tools import VIEW, load_teacher, serving
from train_tools import metrics_line, small_run

from salt_distill.common.config import StudentRun, TeacherRun, VJepaRun, shown_config
from salt_distill.common.metrics import ServiceMetrics
from salt_distill.common.protocol import MAX_CONFIG_BYTES, Progress
from salt_distill.teacher_server.board import board_file
from salt_distill.teacher_server.board.board import Board, Ending
from salt_distill.teacher_server.board.runs import LOST_S, MAX_POINTS, Curve
from salt_distill.teacher_server.http.replica import ReplicaContext


def new_board(file=None, teacher="a" * 64, max_runs=100):
    return Board(max_runs=max_runs, group_timeout_s=60, window_clips=100, teacher=teacher, file=file)


def now(call):
    return asyncio.run(call)


def report(step, loss=0.5, **more):
    return Progress(step=step, slot=8 * step, loss=loss, flops=1e9 * step, **more)


def counters(**values):
    return ServiceMetrics(**values)


def test_a_curve_is_bounded_and_keeps_the_means():
    curve, losses, steps = Curve(), [], 100_000
    numbers = random.Random(0)
    for step in range(1, steps + 1):
        losses.append(numbers.random())
        curve.add(step, 2.0 * step, losses[-1])
    shown = curve.shown().model_dump()
    assert MAX_POINTS / 2 <= len(shown["step"]) <= MAX_POINTS
    assert shown["step"][-1] == steps
    assert shown["flops"] == [2.0 * step for step in shown["step"]]
    for first, last, mean in zip([0, *shown["step"]], shown["step"], shown["loss"], strict=False):
        assert mean == pytest.approx(sum(losses[first:last]) / (last - first))
    assert Curve.model_validate_json(curve.model_dump_json()) == curve


def test_a_resumed_run_goes_on_where_it_resumed():
    curve = Curve()
    for step in (10, 20, 30, 30, 20, 30, 40):
        curve.add(step, None, step / 10)
    assert curve.shown().model_dump() == {"step": [10, 20, 30, 40], "flops": [None] * 4, "loss": [1, 2, 3, 4]}


def test_the_board_outlives_its_process(tmp_path):
    file = tmp_path / "boards" / "board.jsonl"
    board = new_board(file)
    now(
        board.served(
            "http://a#1",
            counters(clips_served=7, memory_bytes=5),
            "student",
            clips=7,
            computed=3,
            shared=3,
            num_bytes=70,
        )
    )
    for step in (10, 20, 30):
        now(
            board.post(
                "student", report(step, loss=1 / step, config={"optim": {"lr": 1e-3}} if step == 10 else None)
            )
        )
    for step in (40, 50):  # each report has the newest loss on held-out clips, and its step
        now(board.post("judged", report(step, val_loss=0.3, val_step=40)))
    now(board.post("other", report(1, group="g")))
    for _ in range(2):  # a second time after the first one's lines were written anew
        again = new_board(file)
        seen, before = now(again.run("student")).model_dump(), now(board.run("student")).model_dump()
        assert seen == before
        assert seen["curve"] == {
            "step": [10, 20, 30],
            "flops": [1e10, 2e10, 3e10],
            "loss": [1 / 10, 1 / 20, 1 / 30],
        }
        assert seen["config"] == {"optim": {"lr": 1e-3}}
        assert (seen["clips_served"], seen["hit_rate"]) == (7, pytest.approx(3 / 7))
        judged = now(again.run("judged")).model_dump()
        assert judged["val_curve"] == {"step": [40], "flops": [4e10], "loss": [0.3]}
        assert judged["progress"]["val_loss"] == 0.3
        assert [run.id for run in now(again.runs())] == ["other", "judged", "student"]
        assert now(again.runs())[0].skew_clips is None  # it is a member of its group when it reports again


def test_counters_are_summed_over_replicas_and_restarts(tmp_path, monkeypatch):
    monkeypatch.setattr("salt_distill.teacher_server.board.board._SAVE_S", -1.0)
    file = tmp_path / "board.jsonl"
    board = new_board(file)
    now(board.served("http://a#1", counters(clips_served=5, memory_bytes=10)))
    now(board.served("http://a#1", counters(clips_served=7, memory_bytes=20)))
    now(board.served("http://b#2", counters(clips_served=100, memory_bytes=1)))
    assert {name: getattr(now(board.metrics()), name) for name in ("clips_served", "memory_bytes")} == {
        "clips_served": 107,
        "memory_bytes": 21,
    }
    now(board.lost("http://a"))  # what it did stays, what it held is gone
    now(
        board.served("http://a#3", counters(clips_served=1, memory_bytes=2))
    )  # another process at the same place
    assert {name: getattr(now(board.metrics()), name) for name in ("clips_served", "memory_bytes")} == {
        "clips_served": 108,
        "memory_bytes": 3,
    }
    again = new_board(file)
    assert now(again.metrics()).clips_served == 108
    assert now(again.metrics()).memory_bytes == 0
    now(
        again.served("http://b#2", counters(clips_served=101, memory_bytes=4))
    )  # the board's process died, this one's did not
    assert {name: getattr(now(again.metrics()), name) for name in ("clips_served", "memory_bytes")} == {
        "clips_served": 109,
        "memory_bytes": 4,
    }


def test_many_replicas_that_ended_are_one_sum(monkeypatch):
    monkeypatch.setattr("salt_distill.teacher_server.board.board._MAX_REPLICAS", 3)
    board = new_board()
    for number in range(20):
        now(board.served(f"http://a#{number}", counters(clips_served=1)))
        now(board.join("http://a", []))
        now(board.lost("http://a"))
        now(board.lost("http://a"))  # others say it too
    now(board.join("http://a", []))
    now(board.leave("http://a"))
    assert now(board.metrics()).replicas_lost == 20
    assert len(board._replicas) <= 4
    assert now(board.metrics()).clips_served == 20


def test_a_torn_line_costs_itself(tmp_path, caplog):
    file = tmp_path / "board.jsonl"
    board = new_board(file)
    for step in (1, 2, 3):
        now(board.post("a", report(step)))
    whole = file.read_text()
    file.write_text(whole[:-10])  # a kill in the middle of a write
    again = new_board(file)
    assert now(again.run("a")).curve.step == [1, 2]
    assert now(again.metrics()).board_corrupt == 1
    assert f"{file}: line 5 is damaged and left out" in caplog.text
    now(again.post("a", report(4)))
    last = new_board(file)
    assert now(last.run("a")).curve.step == [1, 2, 4]
    assert now(last.metrics()).board_corrupt == 0


def test_a_file_is_written_anew_when_it_has_grown(tmp_path, monkeypatch):
    monkeypatch.setattr(board_file, "_LEAST_BYTES", 2000)
    file = tmp_path / "board.jsonl"
    board = new_board(file, max_runs=2)
    sizes = []
    for step in range(1, 1501):
        now(board.post(f"run-{step % 2}", report(step)))
        sizes.append(file.stat().st_size)
    assert max(sizes) < 5 * 2 * (MAX_POINTS + 10) * 70
    assert sum(later < earlier for earlier, later in itertools.pairwise(sizes)) < 30
    assert now(new_board(file, max_runs=2).runs()) == now(board.runs())
    assert [path.name for path in tmp_path.iterdir()] == ["board.jsonl"]


def test_a_full_disk_costs_lines_and_no_answer(tmp_path, caplog):
    folder = tmp_path / "board"
    board = new_board(folder / "board.jsonl")
    folder.rename(tmp_path / "away")
    now(board.post("a", report(1)))
    assert now(board.metrics()).board_not_written == 1
    assert "serving goes on" in caplog.text
    (tmp_path / "away").rename(folder)
    now(board.post("a", report(2)))
    assert now(board.run("a")).curve.step == [1, 2]
    assert now(new_board(folder / "board.jsonl").run("a")).curve.step == [2]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("not ours\n", "is no board"),
        (
            '{"format": "salt-board-1", "teacher": "bbbbbbbbbbbbbbb"}\n',
            "of teacher bbbbbbbbbbbb .*a file of its own",
        ),
    ],
)
def test_a_file_that_is_not_this_teachers_is_refused(tmp_path, content, error):
    file = tmp_path / "board.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=error):
        new_board(file)
    assert file.read_text() == content


def test_a_configuration_is_bounded(service):
    caller, _ = service
    status, answer = caller.post("a", step=1, slot=8, config={"much": "x" * MAX_CONFIG_BYTES})
    assert status == 422
    assert f"at most {MAX_CONFIG_BYTES}" in answer["error"]


@pytest.fixture
def service(tmp_path):
    with serving(load_teacher(tmp_path)) as (url, inside):
        yield Caller(url), inside


def test_one_run_by_its_route(service):
    caller, _ = service
    assert caller.post("a", step=1, slot=8, loss=0.5, flops=1e9, config={"seed": 3})[0] == 200
    seen = caller.json("/v1/runs/a")
    assert (seen["config"], seen["curve"]) == ({"seed": 3}, {"step": [1], "flops": [1e9], "loss": [0.5]})
    assert "config" not in seen["progress"]
    assert caller.send("GET", "/v1/runs/b")[0] == 404
    assert caller.send("GET", "/v1/runs/b%20c")[0] == 422


def test_a_student_shows_what_it_learns_and_no_place(service):
    caller, _ = service
    source_of = {TeacherRun: {}, StudentRun: {"teacher_url": "http://127.0.0.1:1"}, VJepaRun: {}}
    for kind, source in source_of.items():  # a tracker shows all three
        shown = set(shown_config(small_run(kind, **source)))
        assert {"data", "steps", "batch_size", "encoder", "optim"} <= shown
        assert not shown & {*kind.paths, "teacher_url", "address", "wandb"} - {"data"}
    url = f"http://{caller.parts.netloc}"
    values = {
        "data": "s3://key:secret@bucket/toy",
        "teacher_url": url,
        "out": "/home/me/a",
        "view": VIEW.model_dump(),
        "seed": 7,
    }
    source = open_source(
        small_run(StudentRun, **values, loader={"shard_cache_dir": "/home/me/cache"}), run="a"
    )
    line = {"step": 1, "slot": 30, "loss": 0.5, "flops": 1e9, "teacher_wait_ms": 1.0, "clips_per_s": 9.0}
    source.report(metrics_line(**line))
    source.report(metrics_line(**line | {"step": 2}))
    source.close()
    seen = caller.json("/v1/runs/a")
    assert (seen["config"]["data"], seen["config"]["seed"], seen["config"]["encoder"]["width"]) == (
        "toy",
        7,
        32,
    )
    assert not any(
        secret in json.dumps(seen["config"]) for secret in ("secret", "/home", "127.0.0.1", "bucket")
    )
    assert seen["progress"]["step"] == 2
    assert (seen["progress"]["num_steps"], seen["status"], seen["left_s"]) == (10, "stopped", None)


def test_how_a_run_ended(monkeypatch):
    """What a run has said itself; lost is who trains and is not heard of."""
    board = new_board()

    def status():
        [run] = now(board.runs())
        return run.status, run.left_s

    now(board.served("http://a#1", counters(), "a", clips=1))
    assert status() == ("running", None)
    now(board.post("a", report(3, num_steps=10, step_ms=500.0)))
    assert status() == ("running", 3.5)
    seen_s = board._runs["a"].seen_s
    monkeypatch.setattr("time.time", lambda: seen_s + LOST_S + 1)
    assert status() == ("lost", None)
    now(board.post("a", report(4, num_steps=10, step_ms=500.0)))
    assert status() == ("running", 3.0)
    for activity in ("stopped", "finished"):
        now(board.post("a", report(10, num_steps=10, step_ms=500.0, activity=activity)))
        monkeypatch.setattr("time.time", lambda: seen_s + 10 * LOST_S)
        assert status() == (activity, None)


def test_the_board_remembers_an_hour(monkeypatch):
    board, clock = new_board(), [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    for number in range(2000):
        now(board.served(f"http://a#{number % 2}", counters(clips_served=number)))
        clock[0] += 2.5
    seen = now(board.history())
    assert len(seen.seconds) == len(seen.clips_served) == 720
    assert seen.seconds == [clock[0] - 5.0 * number for number in range(720, 0, -1)]
    assert [later - earlier for earlier, later in itertools.pairwise(seen.clips_served)] == [4] * 719


def test_a_drained_service_answers_only_what_it_has_begun(tmp_path):
    gated = GatedTeacher(load_teacher(tmp_path))
    board = new_board()
    context = ReplicaContext(board=board)
    with serving(gated, context=context) as (url, inside), ThreadPoolExecutor(1) as pool:
        caller, clips = Caller(url), clips_by_digest(3)
        first, *_ = clips
        gated.gate.clear()
        begun = pool.submit(caller.statuses, [first], clips)
        wait_until(lambda: inside.open_requests == 1)
        assert json.loads(caller.send("POST", "/v1/drain", headers=JSON)[2]) == {"ending": "drain"}
        status, headers, body = caller.send(
            "POST", "/v1/targets", b"", {"Content-Type": "application/vnd.apache.arrow.stream"}
        )
        assert (status, headers["Retry-After"], json.loads(body)["error"]) == (
            503,
            "0.5",
            "the teacher is drained",
        )
        assert caller.send("GET", "/readyz")[0] == 503
        assert caller.send("GET", "/healthz")[0] == 200
        wait_until(lambda: caller.counters()["draining"] == 1)
        assert now(board.ending()) == (Ending.DRAIN, False)
        gated.gate.set()
        assert begun.result() == ["ok"]
        wait_until(lambda: now(board.ending()) == (Ending.DRAIN, True))
        assert caller.json("/v1/teacher")["ending"] == "drain"


def test_all_replicas_end_together(tmp_path):
    teacher, board = load_teacher(tmp_path), new_board()
    with (
        serving(teacher, context=ReplicaContext(board=board)) as (one, _),
        serving(teacher, context=ReplicaContext(board=board)) as (other, inside),
    ):
        assert Caller(one).send("POST", "/v1/stop", headers=JSON)[0] == 200
        wait_until(lambda: inside.ending is Ending.STOP)
        assert Caller(other).send("GET", "/readyz")[0] == 503
        board._ending = Ending.NO  # its process dies
        wait_until(lambda: now(board.ending()) == (Ending.STOP, True))
