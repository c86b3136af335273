"""TLS that ends in the replica."""

import contextlib
import http.client
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from access_tools import ALICE, OPERATOR, raw, write_tokens
from service_tools import ARROW, Caller, GatedTeacher, clips_by_digest, wait_until
from teacher_tools import batch_of, load_teacher, new_certificate, random_clips, serving

from salt_distill.common.config import ServiceClientConfig, ServiceConfig, StatusConfig
from salt_distill.common.credentials import trusted
from salt_distill.common.targets import codec, wire
from salt_distill.student_trainer.targets.retry import TeacherUnavailableError
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.teacher_server.board.board import Board
from salt_distill.teacher_server.http.listener import Tls, tls_socket
from salt_distill.teacher_server.http.replica import ReplicaContext
from salt_distill.teacher_server.http.service import board_arguments
from salt_distill.teacher_server.status import call


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return new_certificate(tmp_path_factory.mktemp("tls"))


@contextlib.contextmanager
def over_tls(teacher, certificate, **options):
    """The https URL of a replica that ends TLS, and its insides."""
    listening = tls_socket("127.0.0.1", 0)
    context = ReplicaContext(
        board=Board(**board_arguments(teacher.spec, ServiceConfig())),
        front=(listening, Tls(cert=str(certificate[0]), key=str(certificate[1]))),
    )
    url = f"https://localhost:{listening.getsockname()[1]}"
    with serving(teacher, context=context, **options) as (_, inside):
        yield url, inside


def test_a_student_over_tls(teacher, tokens, certificate, monkeypatch):
    batch = batch_of(random_clips(5))
    client = ServiceClientConfig(retry_budget_s=1)
    with over_tls(teacher, certificate, tokens=tokens) as (url, _):
        source = ServiceTargets(url, "float16", client, "alice", token=ALICE, ca=str(certificate[0]))
        expected = [codec.encode(teacher.forward(clip[None]), "float16")[0] for clip in batch.pixels]
        got = source.request(batch).result(timeout=20)
        source.close()
        for row, encoded in zip(got, expected, strict=True):
            tokens_of = codec.decode(
                encoded, "float16", num_tokens=teacher.spec.num_tokens, width=teacher.spec.width
            )
            assert torch.equal(row, tokens_of)
        with pytest.raises(
            ValueError, match=r"shows no certificate that is trusted: .*give --teacher-ca FILE"
        ):
            ServiceTargets(url, "float16", client, "alice", token=ALICE)
        with pytest.raises(TeacherUnavailableError):
            ServiceTargets(
                url.replace("https", "http"), "float16", client, "alice", token=ALICE, ca=str(certificate[0])
            )
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        monkeypatch.setenv("SALT_TOKEN", OPERATOR)
        assert call(StatusConfig(url=url), "/v1/teacher")["fingerprint"] == teacher.spec.fingerprint


def test_an_answer_over_tls_is_given_before_the_end(teacher, certificate):
    gated, trusting = GatedTeacher(teacher), trusted(str(certificate[0]))
    [digest] = clips = clips_by_digest(1)
    body = wire.write_request("float16", [wire.RequestRow(clip_digest=digest, clip=clips[digest].tobytes())])
    with ThreadPoolExecutor(1) as pool:
        with over_tls(gated, certificate) as (url, inside):
            gated.gate.clear()
            request = urllib.request.Request(f"{url}/v1/targets", data=b"".join(body), headers=ARROW)
            answer = pool.submit(lambda: urllib.request.urlopen(request, context=trusting, timeout=20).read())
            wait_until(lambda: inside.batcher.pending_clip(digest) is not None)
            threading.Timer(0.5, gated.gate.set).start()
        assert [row.status for row in wire.read_response(answer.result())[1]] == ["ok"]


def test_a_head_that_trickles(teacher, certificate):
    """Before the first request, and before one that follows another on its connection."""
    with over_tls(teacher, certificate, header_timeout_s=0.4) as (url, _):
        trusting = trusted(str(certificate[0]))
        for whole in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
            answer, seconds = raw(
                url, whole, then=b"GET /v1/teacher HTTP/1.1\r\nX-Slow: ", wait_s=10, tls=trusting
            )
            assert answer.count(b"200 OK") == bool(whole)
            assert 0.3 < seconds < 5
        parts = Caller(url).parts
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, context=trusting, timeout=5)
        for _ in range(3):  # who is slow between whole requests is no attacker
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b'{"alive":true}'
            time.sleep(0.5)
        connection.close()
