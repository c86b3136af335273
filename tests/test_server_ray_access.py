"""Access on the real Ray Serve: tokens behind HAProxy, TLS that ends in the replicas, and where nothing else
listens."""

import http.client
import json
import os
import subprocess
import urllib.request
from contextlib import closing

import pytest
import torch
from serve_tools import SALT_SERVE, descendants, end, start
from service_tools import Caller, clips_by_digest, wait_until
from teacher_tools import batch_of, load_teacher, new_certificate, random_clips

from salt_distill.common.config import ServiceClientConfig
from salt_distill.common.credentials import trusted
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets

TOKEN = "alice-" + 32 * "a"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    return folder / "teacher-0", load_teacher(folder)


@pytest.fixture
def tokens(tmp_path):
    (tmp_path / "tokens.yaml").write_text(f"alice: {{token: {TOKEN}}}\n")
    return tmp_path / "tokens.yaml"


@pytest.mark.slow
def test_tls_ends_in_two_replicas_behind_one_port(teacher, tokens, tmp_path):
    ckpt, local_teacher = teacher
    cert, key = new_certificate(tmp_path)
    flags = (
        "--tokens",
        str(tokens),
        "--tls-cert",
        str(cert),
        "--tls-key",
        str(key),
        "--request-log",
        str(tmp_path / "requests.jsonl"),
    )
    process, url = start(ckpt, "--replicas", "2", "--cpus", "0.4", *flags)
    assert url.startswith("https://127.0.0.1:")
    try:
        wait_until(lambda: facts_of(url, cert)["counters"]["replicas"] == 2)
        batch, client = batch_of(random_clips(24)), ServiceClientConfig(request_clips=3, retry_budget_s=5)
        with closing(LocalTargets(local_teacher, "float16")) as local:
            expected = local.request(batch).result(timeout=30)
        for run in ("alice", "bob"):
            with closing(ServiceTargets(url, "float16", client, run, token=TOKEN, ca=str(cert))) as source:
                assert torch.equal(source.request(batch).result(timeout=30), expected)
        facts = facts_of(url, cert)
        assert (facts["ingress"], facts["counters"]["clips_computed"], facts["counters"]["clips_served"]) == (
            "direct",
            24,
            48,
        )
        environment = {name: value for name, value in os.environ.items() if name != "SALT_TOKEN"} | {
            "SSL_CERT_FILE": str(cert)
        }
        refused = subprocess.run(
            [*SALT_SERVE, "runs", "--url", url], capture_output=True, text=True, env=environment, check=False
        )
        assert (refused.returncode, "401" in refused.stderr) == (1, True), refused
        doors = listening(descendants(process.pid))
        assert len(doors) > 3  # the replicas', Ray Serve's, Ray's own
        for address, port in doors:
            assert not tells(address, port), (address, port)
    finally:
        said = end(process)
    assert "direct ingress, 2 replicas" in said
    logged = (tmp_path / "requests.jsonl").read_text()
    assert {json.loads(line)["run"] for line in logged.splitlines() if '"/v1/targets"' in line} == {
        "alice",
        "bob",
    }
    assert TOKEN not in said + logged


@pytest.mark.faults
def test_tokens_behind_haproxy(teacher, tokens):
    process, url = start(teacher[0], "--tokens", str(tokens))
    try:
        caller, clips = Caller(url), clips_by_digest(2)
        assert caller.send("GET", "/v1/teacher")[0] == 401
        assert caller.ask(list(clips), clips)[0] == 401
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert caller.statuses(list(clips), clips, headers=bearer) == ["ok"] * 2
        status, headers, _ = caller.send("GET", "/metrics", headers={**bearer, "X-Salt-Request": "mine"})
        assert (status, headers["X-Salt-Request"]) == (200, "mine")
        tokens.write_text("bob: {token: bob-0123456789abcdef}\n")
        wait_until(lambda: caller.send("GET", "/v1/runs", headers=bearer)[0] == 401)
    finally:
        end(process)


def listening(pids):
    """Address and port of every TCP socket that these processes listen on."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except (FileNotFoundError, ProcessLookupError):
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    with open("/proc/net/tcp") as table:
        for line in list(table)[1:]:
            local, state, inode = (line.split()[number] for number in (1, 3, 9))
            if state == "0A" and inode in inodes:
                address, port = local.split(":")
                found.add((".".join(str(byte) for byte in reversed(bytes.fromhex(address))), int(port, 16)))
    return found


def tells(address, port):
    """Whether a stranger who asks there, in HTTP, for what the teacher is gets an answer."""
    try:
        return b"fingerprint" in Caller(f"http://{address}:{port}").send("GET", "/v1/teacher", timeout=1)[2]
    except (
        OSError,
        http.client.HTTPException,
    ):  # Ray's own protocols answer in their ways, and its metrics to any path
        return False


def facts_of(url, cert):
    request = urllib.request.Request(f"{url}/v1/teacher", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, context=trusted(str(cert)), timeout=10) as answer:
        return json.load(answer)
