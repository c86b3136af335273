"""`salt-serve status | runs | drain | stop` on the real Ray: a stop under load loses no request, and the
board outlives it."""

import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_tools import SALT_SERVE, end, parts_of, start
from service_tools import Caller, GatedTeacher, clips_by_digest, wait_until
from teacher_tools import load_teacher, save_teacher, serving

from salt_distill.common.config import DrainConfig, ServiceConfig
from salt_distill.teacher_server.board.board import Board, Ending
from salt_distill.teacher_server.http.replica import ReplicaContext
from salt_distill.teacher_server.http.service import board_arguments
from salt_distill.teacher_server.status import drain


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    load_teacher(folder)
    return folder / "teacher-0"


def salt_serve(*arguments):
    return subprocess.run([*SALT_SERVE, *arguments], capture_output=True, text=True, timeout=120)


class Student:
    """Asks for new clips until the service is gone. ``outcomes``: when a request was begun, and what came of
    it."""

    def __init__(self, url: str, number: int) -> None:
        self.outcomes: list[tuple[float, int | str, str]] = []
        self._thread = threading.Thread(target=self._live, args=(url, number))
        self._thread.start()

    def _live(self, url: str, number: int) -> None:
        caller = Caller(url)
        for seed in itertools.count(number, 10):
            clips, begun = clips_by_digest(6, seed=seed), time.monotonic()
            try:
                status, body = caller.ask(list(clips), clips, run=f"student-{number}", timeout=60)
            except (OSError, http.client.HTTPException) as error:
                self.outcomes.append((begun, type(error).__name__, str(error)))
                return
            self.outcomes.append((begun, status, "" if status == 200 else body.decode()))
            if status != 200:
                time.sleep(0.05)

    def join(self):
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()


def test_a_runs_name_and_loss_stand_on_one_line(tmp_path):
    with serving(load_teacher(tmp_path)) as (url, _):
        name = "student-with-a-name"
        Caller(url).post(
            name, step=30_000, num_steps=90_000, step_ms=100, slot=24, loss=0.5, val_loss=0.4, flops=1e19
        )
        assert Caller(url).statuses(list(clips := clips_by_digest(2)), clips) == ["ok"] * 2
        for command in ("status", "runs"):
            shown = salt_serve(command, "--url", url).stdout
            [line] = [line for line in shown.splitlines() if name in line]
            values = ("running", "30,000 of 90,000", "1:40:00", "0.5000", "0.4000")
            assert all(value in line for value in values), shown
        status = salt_serve("status", "--url", url).stdout
        assert "2: 2 computed, 0 already begun" in status
        assert "0 targets that another run had asked for (0%)" in status
        assert re.search(r"faults +none", status)


@pytest.mark.faults
def test_a_stop_under_load_loses_no_request_and_the_board_outlives_it(ckpt, tmp_path):
    board = ["--board-file", str(tmp_path / "board.jsonl")]
    process, url = start(
        ckpt, "--replicas", "2", "--cpus", "0.4", *board, "--set", "service.batch_wait_ms=300"
    )
    wait_until(lambda: Caller(url).counters()["replicas"] == 2)
    assert Caller(url).post("student-0", step=3, slot=24, loss=0.5, flops=1e9, config={"seed": 1})[0] == 200
    students = [Student(url, number) for number in range(3)]
    try:
        wait_until(lambda: all(len(student.outcomes) >= 4 for student in students))
        shown = salt_serve("status", "--url", url), salt_serve("runs", "--url", url)
        assert all("student-0" in ended.stdout and "0.5000" in ended.stdout for ended in shown), shown
        assert "ready" in shown[0].stdout
        served = Caller(url).counters()["clips_served"]
        stopped = salt_serve("stop", "--url", url, "--json")
        assert json.loads(stopped.stdout)["ending"] == "stop", stopped.stderr
        assert process.wait(timeout=30) == 0
    finally:
        if process.poll() is None:
            process.kill()
        for student in students:
            student.join()
    outcomes = sorted(outcome for student in students for outcome in student.outcomes)
    refused_s = next((begun for begun, status, _ in outcomes if status == 503), None)
    assert refused_s is not None, outcomes[-6:]
    answered = [status for begun, status, _ in outcomes if begun < refused_s]
    assert set(answered) == {200}  # nothing that was begun before the first refusal is lost
    refusals = [json.loads(body)["error"] for _, status, body in outcomes if status == 503]
    assert refusals.count("the teacher ends") == len(refusals)
    assert {status for _, status, _ in outcomes if isinstance(status, int)} == {200, 503}

    with serving(load_teacher(tmp_path), context=ReplicaContext(board=board_of(tmp_path))) as (url, _):
        again = Caller(url).json("/v1/runs/student-0")
        assert (again["progress"]["step"], again["config"], again["curve"]["loss"]) == (3, {"seed": 1}, [0.5])
        assert (
            Caller(url).counters()["clips_served"] >= served
        )  # saved each ten seconds, and when the service ends


def test_a_board_of_another_teacher_is_refused_before_anything_starts(ckpt, tmp_path):
    board_of(tmp_path)
    other = save_teacher(tmp_path / "other", 1)
    refused = salt_serve(
        "teacher", "--ckpt", str(other), "--port", "0", "--board-file", str(tmp_path / "board.jsonl")
    )
    assert refused.returncode == 1
    assert "losses under two teachers do not compare" in refused.stderr
    assert "Traceback" not in refused.stderr


def board_of(folder):
    """A board at the file that a service has left, or is to find."""
    return Board(**board_arguments(load_teacher(folder).spec, ServiceConfig()), file=folder / "board.jsonl")


def test_drain_waits_for_what_was_begun(tmp_path):
    gated = GatedTeacher(load_teacher(tmp_path))
    with serving(gated) as (url, inside), ThreadPoolExecutor(2) as pool:
        caller, clips = Caller(url), clips_by_digest(1)
        gated.gate.clear()
        begun = pool.submit(caller.statuses, list(clips), clips, timeout=60)
        wait_until(lambda: inside.open_requests == 1)
        draining = pool.submit(drain, DrainConfig(url=url, wait=60), stop=False)
        wait_until(lambda: inside.ending is Ending.DRAIN)
        time.sleep(0.6)
        assert not draining.done()
        with pytest.raises(
            ConnectionError, match="has not answered everything after 0 s, 1 requests are open"
        ):
            drain(DrainConfig(url=url, wait=0), stop=False)
        gated.gate.set()
        draining.result(timeout=60)
        assert begun.result() == ["ok"]
        assert "drained: takes no new requests" in salt_serve("status", "--url", url).stdout


@pytest.mark.faults
def test_the_board_dies_and_comes_back(ckpt, tmp_path):
    process, url = start(
        ckpt, "--replicas", "2", "--cpus", "0.4", "--board-file", str(tmp_path / "board.jsonl")
    )
    try:
        caller, clips = Caller(url), clips_by_digest(12)
        wait_until(lambda: caller.counters()["replicas"] == 2)
        assert caller.statuses(list(clips), clips, run="a") == ["ok"] * 12
        assert caller.post("a", step=1, slot=8, loss=0.5)[0] == 200
        [pid] = parts_of(process.pid, b"ray::Board")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: caller.send("GET", "/v1/teacher")[0] == 200 and caller.counters()["replicas"] == 2)
        assert caller.counters()["clips_served"] == 12  # the replicas say it again
        [run] = caller.json("/v1/runs")
        assert (run["id"], run["clips_served"], run["progress"]["loss"]) == ("a", 12, 0.5)
        assert caller.statuses(list(clips), clips) == ["ok"] * 12
        assert caller.counters()["clips_computed"] == 12  # who owns a clip they say again too
    finally:
        end(process)


def test_a_service_that_is_not_there_is_one_sentence():
    for command in ("status", "runs", "drain", "stop"):
        ended = salt_serve(command, "--url", "http://127.0.0.1:9")
        assert ended.returncode == 1
        assert "http://127.0.0.1:9" in ended.stderr
        assert "Traceback" not in ended.stderr
