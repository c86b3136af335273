"""``salt-serve teacher``: the service mounted in Ray Serve, where the deployment that owns the model is itself the HTTP ingress."""

import json
import logging
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console

from common.config import ServeConfig
from common.local_ray import is_private, ray_to_join
from teacher_server.board import Ending
from teacher_server.ingress import free_port, haproxy_environment
from teacher_server.placement import SAY_PENDING_S, check_fits, what_is_missing

_ALONE = "teacher"
"""Name of the application of a teacher without `--name`."""
_NAMESPACE = "salt"
"""Where Ray keeps the boards."""
_POLL_S = 0.2
_MAX_ONGOING_REQUESTS = 1000
"""Requests inside a replica, where they wait for the teacher and for each other. What bounds them is bytes: max_pending_bytes."""
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


class Replica:
    """One replica: loads the teacher, and is the ASGI app that Ray Serve's ingress calls."""

    def __init__(self, values: dict[str, Any], board_name: str) -> None:
        import ray
        import torch

        from common.model.checkpoint import open_encoder
        from common.model.teacher import Teacher
        from teacher_server.ingress import ingress_here, let_proxy_send_views
        from teacher_server.replica import Place
        from teacher_server.service import board_arguments, build_app

        let_proxy_send_views()
        config = ServeConfig.model_validate(values)
        teacher = Teacher(open_encoder(config), config.teacher, torch.device("cuda" if config.gpus else "cpu"))
        file = None if config.board_file is None else Path(config.board_file)
        board: Any = _ActorBoard(board_name, {**board_arguments(teacher.spec, config.service), "file": file})
        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, 0))
        place = Place(
            board=board,
            url=f"http://{host}:{listener.getsockname()[1]}",
            listener=listener,
            buckets=config.replica_range[1],
            ingress=ingress_here(),
        )
        self._app = build_app(teacher, config.service, place, None if config.cache is None else Path(config.cache))

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def check_health(self) -> None:
        """Raises where the batcher has ended; Ray Serve then replaces the replica."""
        self._app.state.service.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas follows: see teacher_server.scaling."""
        return {"waiting_clips": self._app.state.service.batcher.queued_clips}


class _ActorBoard:
    """The board of a teacher's replicas, a Ray actor that whoever comes first starts. Where it dies, another takes its place, with its file."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        import ray

        from teacher_server.board import Board

        options: Any = {"name": name, "namespace": _NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
        self._actor = ray.remote(Board).options(num_cpus=0, max_restarts=-1, max_task_retries=3, **options).remote(**arguments)

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        from ray.exceptions import RayActorError

        async def call(*values: Any, **named: Any) -> Any:
            try:
                return await getattr(self._actor, method).remote(*values, **named)
            except RayActorError as error:
                raise ConnectionError(f"the board of this teacher does not answer: {error}") from error

        return call


def serve_teacher(config: ServeConfig, console: rich.console.Console) -> None:
    """Serves until SIGINT or SIGTERM; prints the URL on standard output once /readyz answers."""
    from common.model.checkpoint import open_encoder
    from common.model.teacher import fingerprint
    from teacher_server.board_file import BoardFile

    encoder = open_encoder(config)  # a wrong path or clip is said now, not by a replica
    if config.board_file is not None:
        BoardFile(Path(config.board_file), fingerprint(encoder, encoder.load()))  # another teacher's too
    paths = {name: str(Path(value).resolve()) for name in ("board_file", "cache") if (value := getattr(config, name)) is not None}
    config = config.absolute().model_copy(update=paths)  # a replica may have another working directory
    if config.port and is_private(config.address):
        _require_free(config.host, config.port)
    with _ended_by_signals(), ray_to_join(config.address, environment=haproxy_environment()) as ray_arguments:
        import ray

        ray.init(**ray_arguments)
        try:
            _catch_signals()  # ray.init has set its own
            least, most = config.replica_range
            if is_private(config.address):
                each = {"cpus": least * config.cpus, "gpus": least * config.gpus}
                check_fits(ray.cluster_resources(), **each, flags="--cpus, --gpus and --replicas")
            was_running = "SERVE_CONTROLLER_ACTOR" in _named_actors("serve")
            board_name = f"{config.name or _ALONE}-{time.time_ns():016x}"  # a later command's comes after it
            url = _deploy(config, board_name)
            try:
                _wait_until_ready(url, config, console)
                facts = _get(f"{url}/v1/teacher")
                where = f"{facts['ingress']} ingress, {config.replicas} replicas" if most > 1 else f"{facts['ingress']} ingress"
                said = f"teacher {config.ckpt} is ready ({where}), status page and counters at {url}/"
                console.print(said, highlight=False, soft_wrap=True, markup=False)
                print(url, flush=True)
                signals = _count_signals()  # from here on an exception from a handler could end inside of Ray
                _wait_until_stopped(board_name, signals)
                if not _wait_until_drained(board_name, config.service.drain_s, signals):
                    console.print("ends with requests that were not answered", highlight=False)
            finally:
                _ignore_signals()
                if not is_private(config.address) or config.cache is not None:  # a private Ray ends with everything in it
                    _remove(config.name or _ALONE, board_name, serve_too=not was_running)
        finally:
            ray.shutdown()


def _deploy(config: ServeConfig, board_name: str) -> str:
    """Asks Ray Serve for the deployment; the URL that it will have. One of the same name is replaced, replica by replica."""
    from ray import serve
    from ray.serve.api import RunTarget
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
    from ray.serve.context import _get_global_client

    from teacher_server.scaling import WaitingClips

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its import has set another
    port = config.port or free_port(config.host)
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
    least, most = config.replica_range
    scaling = None
    if least < most:
        policy = AutoscalingPolicy(policy_function=WaitingClips, policy_kwargs={"clips_per_replica": config.service.clips_per_replica})
        scaling = AutoscalingConfig(min_replicas=least, max_replicas=most, policy=policy, upscale_delay_s=10)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=_ALONE,
        num_replicas=None if scaling is not None else least,
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        health_check_period_s=10,
        graceful_shutdown_timeout_s=config.service.drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=_QUIET,
    )
    name, prefix = config.name or _ALONE, "" if config.name is None else f"/{config.name}"
    target = deployment.bind(config.model_dump(mode="json"), board_name)
    serve.run_many(
        [RunTarget(target, name=name, route_prefix=prefix or "/", logging_config=_QUIET)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    return f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{port}{prefix}"


def _remove(name: str, board_name: str, *, serve_too: bool) -> None:
    """Ends an application, unless another command has replaced it meanwhile; and Ray Serve, where nothing else runs on it."""
    import ray
    from ray import serve

    boards = {actor for actor in _named_actors(_NAMESPACE) if actor.rpartition("-")[0] == name}
    is_replaced = max(boards | {board_name}) > board_name
    if not is_replaced:
        serve.delete(name)  # its replicas answer what they have begun
    for board in boards & {board_name} if is_replaced else boards:  # those of commands that were killed too
        ray.kill(ray.get_actor(board, namespace=_NAMESPACE))
    if serve_too and not serve.status().applications:
        serve.shutdown()


def _wait_until_stopped(board_name: str, signals: list[int]) -> None:
    """Returns when somebody has asked the service to stop: over HTTP, or by a signal."""
    while not signals:
        state = _ask_board(board_name, "ending")
        if state is not None and state[0] == Ending.STOP:
            return
        time.sleep(_POLL_S)
    _ask_board(board_name, "stop")


def _wait_until_drained(board_name: str, longest_s: float, signals: list[int]) -> bool:
    """Whether every replica answered what it had begun, in time and before a second signal."""
    deadline = time.monotonic() + longest_s
    while (state := _ask_board(board_name, "ending")) is not None and not state[1]:
        if time.monotonic() > deadline or len(signals) > 1:
            return False
        time.sleep(_POLL_S)
    return True


def _ask_board(board_name: str, method: str) -> Any:
    """What a board answers; None where it is not there."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    try:
        return ray.get(getattr(ray.get_actor(board_name, namespace=_NAMESPACE), method).remote(), timeout=10)
    except (ValueError, RayActorError, GetTimeoutError):
        return None


def _wait_until_ready(url: str, config: ServeConfig, console: rich.console.Console) -> None:
    """Waits for /readyz. Raises RuntimeError where the replica fails; says what is missing where it finds no place."""
    import ray
    from ray import serve

    started, said = time.monotonic(), False
    while not _answers(f"{url}/readyz"):
        application = serve.status().applications[config.name or _ALONE]
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


def _named_actors(namespace: str) -> list[str]:
    from ray.util import list_named_actors

    actors: Any = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace]


def _get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):  # not yet: refused, 404 before the route is known, 503 before the first forward
        return False


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


def _count_signals() -> list[int]:
    """Grows by each SIGINT and SIGTERM from now on."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    return signals


def _ignore_signals() -> None:
    """A second Ctrl-C does not stop the cleaning up; were the command killed, its private Ray would still end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
