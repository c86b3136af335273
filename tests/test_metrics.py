"""What Prometheus reads: of all replicas, of the runs, of a student; and that list, dashboard and exposition
name the same things."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from service_tools import ARROW, Caller, FailingTeacher, GatedTeacher, clips_by_digest, wait_until
from teacher_tools import BATCH_SIZE, load_teacher, serving
from train_tools import ALONE, RandomClips, small_run

from salt_distill.common import metrics
from salt_distill.common.config import ServiceConfig, TeacherRun
from salt_distill.common.metrics import BOUNDS_S, Histogram
from salt_distill.common.metrics_line import STUDENT
from salt_distill.common.metrics_page import page
from salt_distill.common.protocol import RUN_METRICS
from salt_distill.common.targets import wire
from salt_distill.student_trainer.loop import train_on
from salt_distill.teacher_server.board.board import Board
from salt_distill.teacher_server.http.replica import ReplicaContext
from salt_distill.teacher_server.http.service import board_arguments

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


def samples(text):
    """Name and labels, by their names -> value. The parser refuses what is not Prometheus' format."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(caller):
    status, headers, body = caller.send("GET", "/metrics")
    assert (status, headers.get_content_type()) == (200, "text/plain")
    return samples(body.decode())


@contextmanager
def replica(teacher, board, **service):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with serving(
        teacher,
        port=port,
        context=ReplicaContext(board=board, url=f"http://127.0.0.1:{port}", buckets=2),
        **service,
    ) as (url, inside):
        yield Caller(url), inside


def test_either_replica_speaks_for_both(teacher):
    board = Board(**board_arguments(teacher.spec, ServiceConfig()))
    clips = clips_by_digest(6)
    with replica(teacher, board) as (one, _):
        with replica(teacher, board) as (other, _):
            assert one.statuses(list(clips)[:2], clips, run="a") == ["ok"] * 2
            assert other.statuses(list(clips), clips, run="b", headers={"X-Salt-Retry": "2"}) == ["ok"] * 6
            assert other.send("POST", "/v1/targets", b"")[0] == 415
            assert other.send("GET", "/v1/nothing")[0] == 404
            assert one.post("a", step=3, slot=9, loss=0.5, teacher_wait_ms=1.5, clips_per_s=8.0)[0] == 200

            def seen():  # a replica tells the others each second
                return (
                    scrape(one).get(("salt_requests_total", "404", "other"))
                    == scrape(other).get(("salt_requests_total", "404", "other"))
                    == 1
                )

            wait_until(seen)
            of_one, of_other = scrape(one), scrape(other)
        for name in ("clips_served", "clips_computed", "forwards", "retries_seen", "bytes_out"):
            assert of_one[f"salt_{name}_total",] == of_other[f"salt_{name}_total",], name
        assert (
            of_one["salt_clips_served_total",],
            of_one["salt_clips_computed_total",],
            of_one["salt_replicas",],
        ) == (8, 6, 2)
        assert (
            of_one["salt_from_memory_total",],
            of_one["salt_passed_on_total",],
            of_one["salt_retries_seen_total",],
        ) == (2, 2, 1)
        assert (
            of_one["salt_requests_total", "200", "/v1/targets"] == 2
        )  # what replicas ask each other is not counted
        assert of_one["salt_requests_total", "415", "/v1/targets"] == 1
        assert of_one["salt_queue_wait_seconds_count",] == 6
        assert of_one["salt_forward_seconds_count",] == of_one["salt_forwards_total",]
        assert of_one["salt_serialise_seconds_count",] == 3  # and what they answered each other is
        assert of_one["salt_request_seconds_count",] == 3
        assert {
            name: value
            for name, value in of_one.items()
            if name[0].startswith("salt_run_") and name[1] == "a"
        } == {
            **{
                (f"salt_run_{name}", "a"): value
                for name, value in (("step", 3), ("loss", 0.5), ("teacher_wait_ms", 1.5), ("clips_per_s", 8))
            },
            **{
                (f"salt_run_{name}_total", "a"): value
                for name, value in (("clips_served", 2), ("clips_computed", 2), ("clips_shared", 0))
            },
            ("salt_run_bytes_out_total", "a"): of_one["salt_run_bytes_out_total", "a"],
            ("salt_run_seen_timestamp_seconds", "a"): of_one["salt_run_seen_timestamp_seconds", "a"],
        }
        assert scrape(one)["salt_clips_computed_total",] == 6  # of one that has ended too


def test_the_time_of_a_forward_is_where_it_was_spent(teacher):
    gated = GatedTeacher(teacher)
    with serving(gated) as (url, inside), ThreadPoolExecutor(2) as pool:
        caller, clips = Caller(url), clips_by_digest(2 * BATCH_SIZE)
        gated.gate.clear()
        asked = list(clips)
        first = pool.submit(caller.statuses, asked[:BATCH_SIZE], clips)
        wait_until(
            lambda: inside.batcher.queued_clips == 0 and inside.batcher.pending_clip(asked[0]) is not None
        )
        second = pool.submit(caller.statuses, asked[BATCH_SIZE:], clips)
        wait_until(lambda: inside.batcher.queued_clips == BATCH_SIZE)
        busy = scrape(caller)
        assert (busy["salt_queued_clips",], busy["salt_open_requests",]) == (BATCH_SIZE, 2)
        time.sleep(0.3)
        gated.gate.set()
        assert first.result() == second.result() == ["ok"] * BATCH_SIZE
        got = scrape(caller)
    assert (
        got["salt_forward_seconds_bucket", "0.25"] == got["salt_forward_seconds_count",] - 1
    )  # the one at the gate
    assert got["salt_queue_wait_seconds_bucket", "0.25"] == BATCH_SIZE  # the others waited behind it
    assert got["salt_request_seconds_sum",] > 0.6
    assert got["salt_serialise_seconds_sum",] < 0.3


def test_a_failure_and_a_client_that_leaves_are_counted(teacher):
    with serving(failing := FailingTeacher(teacher)) as (url, inside):
        caller, clips = Caller(url), clips_by_digest(2)
        one, other = clips
        body = wire.write_request("float16", [wire.RequestRow(clip_digest=one, clip=clips[one].tobytes())])
        status, headers, _ = caller.send(
            "POST", "/v1/targets", b"".join(body), {**ARROW, "X-Salt-Request": "mine"}
        )
        assert (status, headers["X-Salt-Request"]) == (500, "mine")
        failing.gate.clear()
        with pytest.raises(TimeoutError):
            caller.ask([other], clips, timeout=0.2)
        wait_until(lambda: inside.batcher.counters.answers["/v1/targets"].get(499) == 1)
        failing.gate.set()
        assert scrape(caller)["salt_requests_total", "500", "/v1/targets"] == 1


def test_a_histogram_counts_each_time_once():
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 59.9, 60.0, 61.0):
        histogram.observe(seconds)
    counts = dict(zip([*BOUNDS_S, "above"], histogram.counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {
        0.001: 2,
        0.0025: 1,
        60.0: 2,
        "above": 1,
    }
    assert histogram.sum_s == pytest.approx(180.9021)


def test_every_counter_has_a_metric_and_every_metric_a_sample(teacher, tmp_path):
    with serving(teacher, cache=tmp_path) as (url, _):
        caller, clips = Caller(url), clips_by_digest(1)
        assert caller.statuses(list(clips), clips, run="a") == ["ok"]
        val = {
            "val_loss": 1.0,
            "val_step": 1,
            "predicted_accuracy": 0.5,
            "predicted_low": 0.4,
            "predicted_high": 0.6,
        }
        rest = {"teacher_wait_ms": 1.0, "step_ms": 1.0, "clips_per_s": 1.0, "group": "g"}
        caller.post("a", step=1, slot=1, loss=1.0, flops=1.0, **val, **rest)
        counters = json.loads(caller.send("GET", "/v1/teacher")[2])["counters"]
        exposed = scrape(caller)
    assert all(isinstance(value, int | float) for value in counters.values())
    shown_otherwise = {"forward_s", "requests"}  # as salt_forward_seconds_sum and salt_requests_total
    assert set(counters) <= {metric.of for metric in metrics.SERVICE} | shown_otherwise
    names = {name for name, *_ in exposed}
    for metric in (*metrics.SERVICE, *RUN_METRICS):
        assert (f"{metric.name}_count" if metric.kind == "histogram" else metric.name) in names, metric.name
    listed = {metric.name for metric in (*metrics.SERVICE, *RUN_METRICS)} | {"salt_teacher_info"}
    assert {
        re.sub("_(bucket|sum|count)$", "", name) if "_seconds_" in name else name for name in names
    } == listed


def test_the_list_is_up_to_date():
    assert (ROOT / "docs" / "metrics.md").read_text() == page(), (
        "run `python -m salt_distill.common.metrics_page`"
    )


def test_dashboard_and_scrape_configuration_name_what_there_is():
    board = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    known = {metric.name for metric in (*metrics.SERVICE, *RUN_METRICS, *STUDENT)}
    shown = set()
    for panel in board["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = re.findall(r"salt_\w+", target["expr"])
            assert names, target
            shown |= {re.sub("_bucket$", "", name) for name in names}
            assert not [
                label
                for label in re.findall(r"{{(\w+)}}", target["legendFormat"])
                if label not in ("run", "code", "instance")
            ]
    assert shown <= known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert shown >= {
        "salt_requests_total",
        "salt_queue_wait_seconds",
        "salt_run_clips_served_total",
        "salt_student_teacher_wait_ms",
    }
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["salt-teacher", "salt-student"]


def test_grafana_knows_every_key_of_the_dashboard():
    """Grafana's own typed model of a dashboard drops what it does not know: nothing of ours is lost on the
    way through it."""
    register_default_plugins()
    board = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    assert list(lost(board, through_grafana(board))) == []
    board["panels"][0]["targets"][0]["legendFromat"] = board["panels"][0]["targets"][0].pop("legendFormat")
    assert list(lost(board, through_grafana(board))) == [".panels[0].targets[0].legendFromat"]


def through_grafana(board):
    return json.loads(JSONEncoder().encode(Dashboard.from_json(board)))


def lost(ours, theirs, at=""):
    """Where two pieces of JSON differ; keys that only ``theirs`` has do not count."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from lost(value, theirs[key], f"{at}.{key}") if key in theirs else [f"{at}.{key}"]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(*pair, f"{at}[{number}]")
    elif ours != theirs:
        yield at


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed")
def test_prometheus_takes_the_scrape_configuration_and_every_expression(tmp_path):
    def promtool(*arguments):
        done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    promtool("check", "config", ROOT / "deploy" / "prometheus.yml")
    board = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    expressions = {
        target["expr"].replace("$__rate_interval", "1m")
        for panel in board["panels"]
        for target in panel["targets"]
    }
    rules = [
        {"record": f"expression_{number}", "expr": expression}
        for number, expression in enumerate(sorted(expressions))
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "rules.yml")


def test_a_student_shows_its_newest_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    val = {"val_every": 2, "val_clips": 24}
    config = small_run(TeacherRun, out=str(tmp_path), steps=6, log_every=2, metrics_port=port, **val)
    seen = []

    class Watched(RandomClips):
        def clips(self, slots):
            if slots[0] > 4 * config.batch_size:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    seen.append(samples(answer.read().decode()))
            return super().clips(slots)

    train_on(Watched(config.view.clip_shape, 24), (), config, ALONE, None)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = seen[-1]
    [line] = [line for line in lines if line["step"] == shown["salt_student_step",]]
    for metric in STUDENT:
        if metric.of.startswith("predicted_"):  # it has no line through others
            assert math.isnan(shown[metric.name,])
            assert metric.of not in line
        else:
            assert shown[metric.name,] == pytest.approx(line[metric.of]), metric.name
    with (
        socket.create_server(("127.0.0.1", port)),  # it has given its port back
        pytest.raises(ValueError, match=f"cannot listen on --metrics-port {port}: Address already in use"),
    ):
        train_on(RandomClips(config.view.clip_shape, 24), (), config, ALONE, None)  # type: ignore[arg-type]
