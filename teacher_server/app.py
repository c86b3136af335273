"""``salt-serve teacher``: the service mounted in Ray Serve, where the deployment that owns the model is itself the HTTP ingress."""

import logging
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console

from common.config import ServeConfig
from common.local_ray import is_private, ray_to_join
from teacher_server.placement import SAY_PENDING_S, check_fits, what_is_missing

NAME = "teacher"
_POLL_S = 0.2
_MAX_ONGOING_REQUESTS = 1000
"""Requests inside a replica, where they wait for the teacher and for each other. What bounds them is bytes: max_pending_bytes."""
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


class Replica:
    """One replica: loads the teacher, and is the ASGI app that Ray Serve's ingress calls."""

    def __init__(self, values: dict[str, Any]) -> None:
        import torch

        from common.model.checkpoint import open_encoder
        from common.model.teacher import Teacher
        from teacher_server.service import build_app

        config = ServeConfig.model_validate(values)
        device = torch.device("cuda" if config.gpus else "cpu")
        board_file = None if config.board_file is None else Path(config.board_file)
        self._app = build_app(Teacher(open_encoder(config), config.teacher, device), config.service, board_file)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def check_health(self) -> None:
        """Raises where the batcher has ended; Ray Serve then replaces the replica."""
        self._app.state.service.check()


def serve_teacher(config: ServeConfig, console: rich.console.Console) -> None:
    """Serves until SIGINT or SIGTERM; prints the URL on standard output once /readyz answers."""
    from common.model.checkpoint import open_encoder

    open_encoder(config)  # a wrong path or clip is said now, not by a replica
    config = config.absolute()  # a replica may have another working directory
    if config.board_file is not None:
        config = config.model_copy(update={"board_file": str(Path(config.board_file).resolve())})
    if config.port and is_private(config.address):
        _require_free(config.host, config.port)
    with _ended_by_signals(), ray_to_join(config.address, environment=_haproxy()) as ray_arguments:
        import ray
        from ray import serve

        ray.init(**ray_arguments)
        try:
            _catch_signals()  # ray.init has set its own
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            if is_private(config.address):
                check_fits(ray.cluster_resources(), cpus=config.cpus, gpus=config.gpus, flags="--cpus and --gpus")
            was_running = _serve_is_running()
            url = _deploy(config)
            try:
                _wait_until_ready(url, config, console)
                console.print(f"teacher {config.ckpt} is ready, status page and counters at {url}/", highlight=False, soft_wrap=True)
                print(url, flush=True)
                while True:
                    time.sleep(1)
            finally:
                _ignore_signals()
                if not is_private(config.address):  # a private Ray ends with everything in it
                    serve.delete(NAME) if was_running else serve.shutdown()
        finally:
            ray.shutdown()


def _deploy(config: ServeConfig) -> str:
    """Asks Ray Serve for the deployment; the URL that it will have."""
    from ray import serve
    from ray.serve.api import RunTarget
    from ray.serve.context import _get_global_client

    port = config.port or _free_port(config.host)
    serve.start(http_options={"host": config.host, "port": port, "keep_alive_timeout_s": 120}, logging_config=_QUIET)
    client = _get_global_client()
    assert client is not None, "serve.start connects"
    found = client.http_config
    if (found.host, found.port) != (config.host, port):
        if config.port != 0:
            raise ValueError(
                f"got --host {config.host} --port {port}, but Ray Serve of this cluster already listens on {found.host}:{found.port}: "
                "give those, or --port 0 to take what there is"
            )
        port = found.port
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        health_check_period_s=10,
        graceful_shutdown_timeout_s=1,  # requests are pure, and clients repeat them
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=_QUIET,
    )
    serve.run_many(
        [RunTarget(deployment.bind(config.model_dump(mode="json")), name=NAME, route_prefix="/", logging_config=_QUIET)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    return f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{port}"


def _wait_until_ready(url: str, config: ServeConfig, console: rich.console.Console) -> None:
    """Waits for /readyz. Raises RuntimeError where the replica fails; says what is missing where it finds no place."""
    import ray
    from ray import serve

    started, said = time.monotonic(), False
    while not _answers(f"{url}/readyz"):
        application = serve.status().applications[NAME]
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [deployment.message for deployment in application.deployments.values()]
            raise RuntimeError(f"the teacher did not start: {application.message} {' '.join(reasons)}".strip())
        states = [state for deployment in application.deployments.values() for state in deployment.replica_states]
        missing = what_is_missing(ray.available_resources(), cpus=config.cpus, gpus=config.gpus)
        if missing is not None and "RUNNING" not in states and not said and time.monotonic() - started > SAY_PENDING_S:
            said = True
            advice = "end other jobs, add nodes, or lower --cpus and --gpus"
            console.print(f"the teacher waits for a place: {missing} free: {advice}", highlight=False)
        time.sleep(_POLL_S)


def _serve_is_running() -> bool:
    from ray.util import list_named_actors

    actors: Any = list_named_actors(all_namespaces=True)
    return any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in actors)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):  # not yet: refused, 404 before the route is known, 503 before the first forward
        return False


def _haproxy() -> dict[str, str]:
    """Variables that put Ray Serve's HAProxy before the deployment: megabyte bodies pass it twice as fast as the Python proxy.

    Its own paths and ports are the same for all users of a machine, so a private Ray needs others; ``{folder}`` is that Ray's own.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": "{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "{folder}",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port("127.0.0.1")),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port("127.0.0.1")),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port}: {error.strerror}: give another --port, or --port 0 for a free one"
            ) from error


class _EndedError(Exception):
    """SIGINT or SIGTERM."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A block that SIGINT and SIGTERM end, after its own cleaning up, as if it had returned."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _catch_signals()
    try:
        yield
    except _EndedError:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _catch_signals() -> None:
    def end(number: int, frame: Any) -> None:
        raise _EndedError

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _ignore_signals() -> None:
    """A second Ctrl-C does not stop the cleaning up; were the command killed, its private Ray would still end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
