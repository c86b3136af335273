"""HAProxy as `salt-serve teacher` runs it, before a server of a test: what Ray has no setting for."""

import json
import os
import resource
import select
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serve_tools import is_loopback, listening
from service_tools import Caller

from salt_distill.common.protocol import ErrorBody
from salt_distill.teacher_server.ray_serve.ingress import free_port, haproxy_environment, port_for_later


class Server(BaseHTTPRequestHandler):
    """Is healthy; answers /ours with a 404 of ours, and everything else as a proxy that knows no route."""

    def do_GET(self):
        ours = self.path == "/ours"
        body = b'{"error": "no such run"}' if ours else b"Path '/' not found."
        self.send_response(200 if self.path == "/-/healthz" else 404)
        self.send_header("Content-Type", "application/json" if ours else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def ingress(folder: Path, server_port: int | None, header_timeout_s: float = 0.5):
    """The URL of an HAProxy that Ray Serve has configured, and its process."""
    from ray.serve._private import haproxy

    variables = haproxy_environment(header_timeout_s=header_timeout_s)
    environment = {name: value.format(folder=folder) for name, value in variables.items()}
    port, metrics_port = port_for_later(), int(environment["RAY_SERVE_HAPROXY_METRICS_PORT"])
    config = haproxy.HAProxyConfig(
        http_options=haproxy.HTTPOptions(host="127.0.0.1", port=port),
        socket_path=environment["RAY_SERVE_HAPROXY_SOCKET_PATH"],
        metrics_port=metrics_port,
        stats_port=int(environment["RAY_SERVE_HAPROXY_STATS_PORT"]),
        maxconn=int(environment["RAY_SERVE_HAPROXY_MAXCONN"]),
    )
    backends = {}
    if server_port is not None:
        server = haproxy.ServerConfig(name="replica", host="127.0.0.1", port=server_port)
        backends["teacher"] = haproxy.BackendConfig(
            name="teacher", path_prefix="/", app_name="teacher", servers=[server]
        )
    file = folder / "haproxy.cfg"
    haproxy.HAProxyApi(config, backends, str(file))._generate_config_file_internal()
    program = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file)]
    process = subprocess.Popen(program, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 10
        while not listening({process.pid}):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.communicate()


def require_not_ready(answer):
    status, headers, body = answer
    assert (status, headers["Retry-After"], headers["Content-Type"]) == (503, "1", "application/json"), body
    assert ErrorBody.model_validate_json(body).error == "the teacher is not ready"


def test_a_path_that_is_not_known_yet_is_a_service_that_starts(tmp_path):
    with ingress(tmp_path, None) as (url, process):
        for path in ("/readyz", "/v1/teacher", "/"):
            require_not_ready(Caller(url).send("GET", path))
        assert [address for address in listening({process.pid}) if not is_loopback(address[0])] == []


def test_no_replica_is_a_service_that_starts(tmp_path):
    with ingress(tmp_path, free_port("127.0.0.1")) as (url, _):
        require_not_ready(Caller(url).send("GET", "/readyz"))


def half_heads(url: str, count: int, source: str, stack: ExitStack) -> list[socket.socket]:
    """Connections from an address on which half a head was sent."""
    parts, connections = Caller(url).parts, []
    for _ in range(count):
        connection = stack.enter_context(socket.socket())
        connection.bind((source, 0))
        connection.settimeout(10)  # waits until it is open: of thousands at once the kernel drops some
        connection.connect_ex((parts.hostname, parts.port))
        connections.append(connection)
    for connection in connections:
        with suppress(OSError):  # refused
            connection.send(b"GET / HTTP/1.1\r\nHost: teacher\r\nX-More: ")
    return connections


@contextmanager
def many_files():
    """As many as this process may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("other_address", [False, True])
def test_half_heads_of_one_address_leave_room_for_others(other_address, tmp_path):
    with (
        many_files(),
        ExitStack() as stack,
        ThreadingHTTPServer(("127.0.0.1", 0), Server) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, _ = stack.enter_context(ingress(tmp_path, server.server_address[1], header_timeout_s=30))
        most = int(haproxy_environment(header_timeout_s=30)["RAY_SERVE_HAPROXY_MAXCONN"]) * 3 // 4
        count = most + 300 if other_address else 4_300
        halves = half_heads(url, count, "127.0.0.2" if other_address else "127.0.0.1", stack)
        began = time.monotonic()
        assert Caller(url).send("GET", "/ours")[0] == 404
        assert time.monotonic() - began < 1
        poll = select.poll()
        for connection in halves:
            poll.register(connection, select.POLLIN)
        too_many = max(0, count - most)  # for one address
        deadline = time.monotonic() + 10
        while len(poll.poll(0)) < too_many and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(poll.poll(0)) == too_many  # ended
        server.shutdown()


def test_a_404_that_is_not_ours_is_a_service_that_starts(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with ingress(tmp_path, server.server_address[1]) as (url, _):
            require_not_ready(Caller(url).send("GET", "/readyz"))
            status, _, body = Caller(url).send("GET", "/ours")
            assert (status, json.loads(body)) == (404, {"error": "no such run"})
            parts = Caller(url).parts
            with socket.create_connection((parts.hostname, parts.port), timeout=10) as half:
                half.sendall(b"GET / HTTP/1.1\r\nHost: teacher\r\nX-More: ")
                began, answer = time.monotonic(), b""
                while piece := half.recv(1000):
                    answer += piece
            assert time.monotonic() - began < 3
            assert answer.startswith(b"HTTP/1.1 408 ")
        server.shutdown()
