"""HAProxy as `salt-serve teacher` runs it, before a server of a test: what Ray has no setting for."""

import json
import os
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from serve_tools import is_loopback, listening
from service_tools import Caller

from salt_distill.common.protocol import ErrorBody
from salt_distill.teacher_server.ray_serve.ingress import free_port, haproxy_environment


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
def ingress(folder: Path, server_port: int | None):
    """The URL of an HAProxy that Ray Serve has configured, and its process."""
    from ray.serve._private import haproxy

    environment = {
        name: value.format(folder=folder) for name, value in haproxy_environment(header_timeout_s=0.5).items()
    }
    port, metrics_port = free_port("127.0.0.1"), int(environment["RAY_SERVE_HAPROXY_METRICS_PORT"])
    config = haproxy.HAProxyConfig(
        http_options=haproxy.HTTPOptions(host="127.0.0.1", port=port),
        socket_path=environment["RAY_SERVE_HAPROXY_SOCKET_PATH"],
        metrics_port=metrics_port,
        stats_port=int(environment["RAY_SERVE_HAPROXY_STATS_PORT"]),
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
