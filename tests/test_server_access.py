"""Who may ask a teacher service for what: tokens, their limits, and the flags that let strangers in."""

import contextlib
import json
import logging
import re
import socket
import sys
import time

import pytest
from access_tools import ALICE, GROUP, JSON, OPERATOR, REPORT, bearer, write_tokens
from service_tools import ARROW, Caller, clips_by_digest, wait_until
from student_tools import open_source
from teacher_tools import VIEW, batch_of, load_teacher, random_clips, serving
from train_tools import ALONE, RandomClips, small_run

import salt_distill.teacher_server.cli
from salt_distill.common.command import run_app
from salt_distill.common.config import ServiceClientConfig, ServiceConfig, StudentRun
from salt_distill.common.credentials import access_token
from salt_distill.common.protocol import Header
from salt_distill.common.targets import wire
from salt_distill.student_trainer.loop import train_on
from salt_distill.student_trainer.run_directory import claimed
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.teacher_server.board.board import Board, Rates
from salt_distill.teacher_server.http.access import Tokens, read_tokens
from salt_distill.teacher_server.http.replica import ReplicaContext
from salt_distill.teacher_server.http.service import board_arguments, build_app


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path)


@pytest.fixture
def caller(teacher, tokens):
    with serving(teacher, tokens=tokens, lease_s=0.05) as (url, _):
        yield Caller(url)


def requests(app):
    """Every method and path of an app, a run in the place of a run."""
    for route in app.routes:
        for method in sorted(route.methods or ()):
            yield method, re.sub(r"{\w+}", "alice", route.path)


def test_every_route_refuses_who_has_no_token(teacher, tokens, caller):
    refused = []
    for method, path in requests(build_app(teacher, ServiceConfig())):
        for headers in (
            {},
            bearer("wrong-" + 32 * "w"),
            bearer(ALICE[:-1]),
            {"Authorization": f"Basic {ALICE}"},
            {Header.PASSED: "1"},
        ):
            status, answered, body = caller.send(
                method, path, None if method in ("GET", "HEAD") else REPORT, {**JSON, **headers}
            )
            if path in ("/", "/healthz", "/readyz") and Header.PASSED not in headers:
                assert status == 200
                continue
            refused.append(path)
            assert status == 401, (method, path, headers)
            assert answered["WWW-Authenticate"] == "Bearer" or Header.PASSED in headers
            if method != "HEAD":
                assert set(json.loads(body)) == {"error", "expected", "got", "hint"}
                assert not any(secret in body.decode() for secret in ("wrong-", ALICE[:-1]))
    assert {
        "/v1/teacher",
        "/v1/targets",
        "/v1/runs",
        "/v1/runs/alice/progress",
        "/metrics",
        "/docs",
        "/openapi.json",
    } <= set(refused)
    assert caller.send("GET", "/v1/nothing")[0] == 401  # not even which routes there are
    assert caller.send("GET", "/v1/../healthz/../v1/teacher")[0] == 401


def test_a_token_that_is_taken_away_or_added(teacher, tokens, caplog):
    with serving(teacher, tokens=tokens) as (url, _):
        caller = Caller(url)
        paths = [
            path
            for method, path in requests(build_app(teacher, ServiceConfig()))
            if method == "GET" and path not in ("/healthz", "/readyz", "/")
        ]
        assert {caller.send("GET", path, headers=bearer(OPERATOR))[0] for path in paths} == {
            200,
            404,
        }  # there is no run yet
        tokens.write_text("nonsense: [")
        wait_until(lambda: "stay as they were" in caplog.text)
        assert caller.send("GET", "/v1/runs", headers=bearer(OPERATOR))[0] == 200
        new = "new-" + 32 * "n"
        tokens.write_text(f"new: {{token: {new}}}\n")
        wait_until(lambda: caller.send("GET", "/v1/runs", headers=bearer(new))[0] == 200)
        assert {caller.send("GET", path, headers=bearer(OPERATOR))[0] for path in paths} == {401}
    assert new not in caplog.text


def test_a_token_speaks_for_its_runs_and_their_groups_only(caller):
    clips = clips_by_digest(1)
    for token, run, group, expected in (
        (ALICE, "alice", None, 200),
        (ALICE, "alice-2", None, 200),
        (ALICE, "vit-l", None, 403),
        (ALICE, "alice", "vit", 403),
        (GROUP, "vit-l", "vit", 200),
        (GROUP, "vit-l", "other", 403),
        (GROUP, "alice", "vit", 403),
        (OPERATOR, "whoever", "any", 200),
    ):
        report = json.dumps({"step": 1, "slot": 0, "group": group})
        assert (
            caller.send("POST", f"/v1/runs/{run}/progress", report, {**JSON, **bearer(token)})[0] == expected
        ), (token, run, group)
        if group is None:
            assert caller.ask(list(clips), clips, run=run, headers=bearer(token))[0] == expected
    assert caller.send("POST", "/v1/something/new", b"", bearer(ALICE))[0] == 403
    assert caller.send("POST", "/v1/something/new", b"", bearer(OPERATOR))[0] == 404


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "expected names with a `token` each"),
        ("a: {token: SECRET-short}", r"a\.token: expected 16 to 512 of"),
        ("a: {token: SECRET-with space and more}", r"a\.token: expected 16 to 512 of"),
        ("a: SECRET-0123456789abcdef", "a: expected keys and values"),
        ("a: {token: SECRET-0123456789abcdef, colour: SECRET-1}", "a.colour: unknown key"),
        ("a: {tokn: SECRET-0123456789abcdef}", r"a\.token is required"),
        (
            "a: {token: SECRET-0123456789abcdef}\nb: {token: SECRET-0123456789abcdef}",
            "a and b have one token",
        ),
        ("a: {token: SECRET-0123456789abcdef\nb: ]", "line 2: not YAML"),
        ("a: {token: 1234567890123456}", r"a\.token: expected a text: put it in quotes"),
    ],
)
def test_a_malformed_file_is_named_and_not_quoted(tmp_path, content, said):
    (tmp_path / "tokens").write_text(content)
    with pytest.raises(ValueError, match=said) as refused:
        Tokens(tmp_path / "tokens")
    assert "SECRET" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert "SECRET" not in str(refused.value.__suppress_context__ or refused.value.__context__)


def test_a_missing_file_is_an_error_at_first_and_none_later(tmp_path, tokens, caplog):
    with pytest.raises(ValueError, match="no-such: No such file"):
        read_tokens(tmp_path / "no-such")
    known = Tokens(tokens)
    tokens.unlink()
    known.reload()
    known.reload()
    assert known.find(f"Bearer {ALICE}").name == "alice"
    assert caplog.text.count("stay as they were") == 1
    assert ALICE not in repr(known.find(f"Bearer {ALICE}"))


def test_limits_of_a_token(teacher, tmp_path):
    (tmp_path / "tokens").write_text(
        "small: {token: small-0123456789abcdef, max_request_bytes: 5000, max_request_clips: 2}\n"
        "slow: {token: slow-0123456789abcdef, clips_per_s: 4}\n"
    )
    with serving(teacher, tokens=tmp_path / "tokens", max_request_clips=3, lease_s=0.01) as (url, _):
        caller, clips = Caller(url), clips_by_digest(4)
        for name, numbers in (("small", {2: 200, 3: 413}), ("slow", {3: 200, 4: 413})):
            for number, expected in numbers.items():
                status, body = caller.ask(list(clips)[:number], headers=bearer(f"{name}-0123456789abcdef"))
                assert status == expected, (name, number, body)
                if status == 413:
                    assert json.loads(body)["expected"] == f"at most {number - 1} clips"
        status, body = caller.ask(list(clips)[:2], clips, headers=bearer("small-0123456789abcdef"))
        assert (status, json.loads(body)["expected"]) == (413, "at most 5000 bytes")
        body = b"".join(
            wire.write_request("float16", [wire.RequestRow(clip_digest=digest) for digest in list(clips)[:3]])
        )
        headers = {**ARROW, **bearer("slow-0123456789abcdef")}
        assert (
            caller.send("POST", "/v1/targets", body, headers)[0] == 200
        )  # a second's worth was left of the first request
        status, answered, said = caller.send("POST", "/v1/targets", body, headers)
        assert (status, json.loads(said)["expected"]) == (429, "at most 4 clips/s")
        assert 0 < float(answered["Retry-After"]) <= 0.5
        time.sleep(float(answered["Retry-After"]))
        assert caller.send("POST", "/v1/targets", body, headers)[0] == 200


def test_a_rate_is_kept_over_time():
    now = 0.0
    rates = Rates(clock=lambda: now)
    taken = 0
    for _ in range(1000):
        if rates.take("a", 7, per_s=10) == 0:
            taken += 7
        now += 0.1
    assert taken == pytest.approx(10 * 100, rel=0.03)
    assert rates.take("b", 1, per_s=1) == 0  # others have their own


def test_replicas_answer_each_other_and_no_stranger(teacher, tokens):
    board = Board(**board_arguments(teacher.spec, ServiceConfig()))
    clips = clips_by_digest(4)
    with contextlib.ExitStack() as stack:
        callers, inner = [], []
        for _ in range(2):
            listener = socket.create_server(("127.0.0.1", 0))
            inner.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
            context = ReplicaContext(board=board, url=inner[-1], listener=listener, buckets=2)
            callers.append(Caller(stack.enter_context(serving(teacher, context=context, tokens=tokens))[0]))
        assert callers[0].statuses(list(clips)[:2], clips, run="alice", headers=bearer(ALICE)) == ["ok"] * 2
        assert callers[1].statuses(list(clips), clips, run="alice", headers=bearer(ALICE)) == ["ok"] * 4
        facts = json.loads(callers[0].send("GET", "/v1/teacher", headers=bearer(ALICE))[2])
        assert (facts["counters"]["passed_on"], facts["counters"]["clips_computed"]) == (2, 4)
        for stranger in ({}, bearer(OPERATOR), {Header.PASSED: "1"}, {Header.PASSED: ""}):
            for path in ("/v1/teacher", "/healthz", "/", "/metrics"):
                assert Caller(inner[0]).send("GET", path, headers=stranger)[0] == 401, (path, stranger)


def test_no_secret_and_no_pixel_in_any_log(teacher, tokens, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with serving(teacher, tokens=tokens, request_log=tmp_path / "logs" / "requests.jsonl") as (url, _):
        caller, clips = Caller(url), clips_by_digest(2)
        assert (
            caller.statuses(
                list(clips), clips, run="alice", headers={**bearer(ALICE), "X-Salt-Request": "mine-1"}
            )
            == ["ok"] * 2
        )
        caller.ask(list(clips), run="alice", headers=bearer("wrong-" + ALICE))
        caller.ask(list(clips), run="alice", headers={**bearer(GROUP), "X-Salt-Request": 'x" {"evil'})
        caller.send("POST", "/v1/targets", ALICE.encode(), {**ARROW, **bearer(ALICE), "X-Salt-Run": "alice"})
        caller.send("GET", f"/v1/{ALICE}", headers=bearer(ALICE))
        status, headers, _ = caller.send(
            "GET", "/v1/teacher", headers={**bearer(OPERATOR), "X-Salt-Request": "a" * 65}
        )
        assert (status, len(headers["X-Salt-Request"])) == (200, 12)
    written = (tmp_path / "logs" / "requests.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    first = lines[0]
    assert (first["request"], first["run"], first["token"], first["route"], first["status"]) == (
        "mine-1",
        "alice",
        "alice",
        "/v1/targets",
        200,
    )
    assert first["clips"] == [digest.hex()[:12] for digest in clips]
    assert (first["num_clips"], first["num_computed"]) == (2, 2)
    assert [line["status"] for line in lines] == [200, 401, 403, 422, 404, 200]
    said = written + caplog.text + "".join(capfd.readouterr())
    for secret in (ALICE, GROUP, OPERATOR):
        assert secret not in said
    pixels = next(iter(clips.values())).tobytes()
    assert pixels[:8].hex() not in said
    assert "evil" not in said


def test_both_sides_name_a_request_that_is_repeated(teacher, tmp_path, caplog):
    with serving(teacher, request_log=tmp_path / "requests.jsonl", retry_after_s=0.1) as (url, inside):
        with contextlib.closing(ServiceTargets(url, "float16", ServiceClientConfig(), "a")) as source:
            inside.ready = False
            targets = source.request(batch_of(random_clips(2)))
            wait_until(lambda: inside.batcher.counters.retries_seen >= 2)
            inside.ready = True
            targets.result(timeout=20)
        assert inside.batcher.counters.retries_seen == source.counters()["retries"]
    refused = [
        json.loads(line)
        for line in (tmp_path / "requests.jsonl").read_text().splitlines()
        if '"status": 503' in line
    ]
    warned = re.findall(
        r"503 the teacher is not ready: .* \(request ([0-9a-f]{12})\); it fails since .* trying again",
        caplog.text,
    )
    assert [line["request"] for line in refused] == warned
    assert len(warned) >= 2


# --- the command ---


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--host", "0.0.0.0"), "got --host 0.0.0.0 without --tokens, expected a file of access tokens"),
        (("--host", "teacher.example"), "give --tokens FILE, or --insecure"),
        (("--tokens", "FILE", "--insecure"), "got --insecure with --tokens"),
        (("--tls-cert", "cert.pem"), "got --tls-cert cert.pem and --tls-key None, expected both"),
        (("--name", "../teacher"), "--name: got '../teacher', expected up to 64 letters, digits"),
    ],
)
def test_flags_that_would_let_strangers_in(flags, said, capsys, monkeypatch, tokens):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "salt-serve",
            "teacher",
            "--ckpt",
            "run",
            *(str(tokens) if flag == "FILE" else flag for flag in flags),
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        run_app(salt_distill.teacher_server.cli.app)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--insecure",), ("--tokens", "FILE")])
def test_flags_that_open_the_door_knowingly(more, capsys, monkeypatch, tokens):
    command = ["salt-serve", "teacher", "--ckpt", "run", "--host", "0.0.0.0", "--print-config"]
    monkeypatch.setattr(sys, "argv", [*command, *(str(tokens) if flag == "FILE" else flag for flag in more)])
    with pytest.raises(SystemExit) as stopped:
        run_app(salt_distill.teacher_server.cli.app)
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert "host: 0.0.0.0" in printed
    assert ALICE not in printed


def test_a_student_shows_its_token_and_leaves_it_nowhere(
    teacher, tokens, tmp_path, caplog, capfd, monkeypatch
):
    caplog.set_level(logging.DEBUG)
    (tmp_path / "alice.token").write_text(f"{ALICE}\n")
    with serving(teacher, tokens=tokens) as (url, _):
        values = {
            "teacher_url": url,
            "out": str(tmp_path / "alice"),
            "view": VIEW,
            "steps": 4,
            "log_every": 1,
            "client": {"retry_budget_s": 1},
        }
        config = small_run(StudentRun, teacher_token_file=str(tmp_path / "alice.token"), **values)
        assert isinstance(config, StudentRun)
        with (
            claimed(config) as checkpoint,
            contextlib.closing(open_source(config, run="alice")) as source,
        ):
            train_on(RandomClips(config.view.clip_shape), [source], config, ALONE, checkpoint)
        monkeypatch.setenv("SALT_TOKEN", "wrong-" + 32 * "w")
        with pytest.raises(
            ValueError, match="the teacher refused a request: 401 a token is needed"
        ) as refused:
            open_source(small_run(StudentRun, **values), run="alice")
        monkeypatch.delenv("SALT_TOKEN")
        with pytest.raises(
            ValueError,
            match=(
                r"got no Authorization header.*--teacher-token-file FILE or SALT_TOKEN.*\(request"
                r" [0-9a-f]{12}\)"
            ),
        ):
            open_source(small_run(StudentRun, **values), run="alice")
    said = caplog.text + "".join(capfd.readouterr()) + str(refused.value)
    files = [path for path in (tmp_path / "alice").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "summary.json"} <= {path.name for path in files}
    for secret in (ALICE, "wrong-"):
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_token_file_that_holds_something_else(tmp_path):
    for content in ("", "two tokens", "caf\u00e9-0123456789abcdef"):
        (tmp_path / "token").write_text(content)
        with pytest.raises(ValueError, match="expected one access token") as refused:
            access_token(str(tmp_path / "token"))
        assert not content or content not in str(refused.value)
    with pytest.raises(ValueError, match=r"no access token in .*no-such"):
        access_token(str(tmp_path / "no-such"))
