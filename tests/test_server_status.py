"""What the commands for a running service trust of who answers them."""

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest

from salt_distill.common.config import RunsConfig, StatusConfig
from salt_distill.common.protocol import Route
from salt_distill.teacher_server import status
from salt_distill.teacher_server.status import call, show_runs


@contextlib.contextmanager
def answering(code, headers, body=b""):
    """The URL of a server that answers every request so, and the headers of those that it had."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(dict(self.headers))
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def run_said(name, **progress):
    """A run as ``GET /v1/runs`` lists it."""
    return {
        "id": name, "clips_served": 96, "clips_computed": 96, "clips_shared": 0, "bytes_out": 1,
        "seen_s": time.time(), "hit_rate": 0.0, "skew_clips": None, "status": "running", "left_s": None,
        "progress": {"step": 40, "slot": 8, **progress},
    }  # fmt: skip


def test_runs_have_a_column_for_a_predicted_accuracy_where_one_is_predicted(capsys):
    said = {"val_loss": 0.31, "predicted_accuracy": 0.6123, "predicted_low": 0.5801, "predicted_high": 0.6445}
    for runs, shown in (([run_said("a")], False), ([run_said("a"), run_said("b", **said)], True)):
        with answering(200, {}, json.dumps(runs).encode()) as (url, _):
            show_runs(RunsConfig(url=url))
        header, _, *rows = capsys.readouterr().out.strip().splitlines()
        assert [name in header for name in ("held-out", "predicted", "group")] == [shown, shown, False]
        assert len(rows) == len(runs)
    assert "0.3100   0.612 (0.580 to 0.644)" in rows[1]
    assert "to" not in rows[0]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_token_follows_a_redirect(code, tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef")
    with (
        answering(200, {}, json.dumps([]).encode()) as (elsewhere, asked_elsewhere),
        answering(code, {"Location": f"{elsewhere}/v1/runs"}) as (url, asked),
        pytest.raises(ValueError, match=f"sends GET /v1/runs elsewhere, to {elsewhere}/v1/runs"),
    ):
        call(StatusConfig(url=url, token_file=str(tmp_path / "token")), Route.RUNS)
    assert [headers["Authorization"] for headers in asked] == ["Bearer 0123456789abcdef"]
    assert asked_elsewhere == []


def test_an_answer_that_is_nested_without_end_is_a_sentence():
    with (
        answering(200, {}, b"[" * 200_000) as (url, _),
        pytest.raises(ConnectionError, match="does not answer GET /v1/teacher"),
    ):
        call(StatusConfig(url=url), Route.TEACHER)


@pytest.mark.parametrize(("status", "kind"), [(200, ConnectionError), (404, ValueError)])
def test_another_web_server_is_told_by_its_title(status, kind):
    page = b"<html><head><title>My page</title></head><body>" + 9000 * b"x\n"
    with (
        answering(status, {}, page) as (url, _),
        pytest.raises(kind, match=r"^[^\n]* a web page with the title 'My page'[^\n]*$"),
    ):
        call(StatusConfig(url=url), Route.TEACHER)


@pytest.mark.parametrize("begun", [b"X-More: ", b"Content-Length: 1000\r\n\r\n"])
def test_a_dripping_answer_ends_with_the_time_for_a_whole_one(begun, monkeypatch):
    monkeypatch.setattr(status, "_ANSWER_S", 0.5)
    ends = threading.Event()

    def drip():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + begun)
            while not ends.wait(0.1):
                connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        with pytest.raises(ConnectionError, match="in the time for a whole answer"):
            call(StatusConfig(url=f"http://127.0.0.1:{server.getsockname()[1]}"), Route.TEACHER)
        assert time.monotonic() - began < 2
        ends.set()
        thread.join()
