"""``salt-serve teacher``: the service mounted in Ray Serve, where the deployment that owns the model is
itself the HTTP ingress."""

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console

from salt_distill.common.config import ServeConfig
from salt_distill.common.console import console
from salt_distill.common.devices import gpus_or_any
from salt_distill.common.local_ray import is_private, join, leave, ray_to_join
from salt_distill.common.protocol import Header, Route
from salt_distill.common.termination import ended_by_signals
from salt_distill.teacher_server.board.board import Ending
from salt_distill.teacher_server.http.access import check_access
from salt_distill.teacher_server.ray_serve.deployment import ALONE, NAMESPACE, QUIET, bind
from salt_distill.teacher_server.ray_serve.ingress import KEEP_ALIVE_S, free_port, haproxy_environment
from salt_distill.teacher_server.ray_serve.placement import SAY_PENDING_S, check_fits, what_is_missing
from salt_distill.teacher_server.ray_serve.signals import count_signals, ignore_signals

_POLL_S = 0.2
_BOARD_LOST_S = 60.0
"""A board that does not answer for so long has no Ray any more that would start it again."""


def serve_teacher(config: ServeConfig, console: rich.console.Console = console) -> None:
    """Serves until SIGINT or SIGTERM; prints the URL, and nothing else, on standard output once /readyz
    answers.

    What replicas and Ray say goes to standard error.
    """
    from salt_distill.common.model.checkpoint import open_encoder
    from salt_distill.common.model.teacher import fingerprint
    from salt_distill.teacher_server.board.board_file import BoardFile

    encoder = open_encoder(config)  # a wrong path or clip is said now, not by a replica
    check_access(config)
    if config.board_file is not None:
        BoardFile(Path(config.board_file), fingerprint(encoder, encoder.load()))  # another teacher's too
    config = config.absolute()  # a replica may have another working directory
    if config.port and is_private(config.address):
        _require_free(config.host, config.port)
    environment = haproxy_environment(config.service.header_timeout_s)
    if config.tls_cert is not None:  # the replicas listen themselves
        environment, config = {}, config.model_copy(update={"port": config.port or free_port(config.host)})
    stdout = sys.stdout
    with (
        contextlib.redirect_stdout(sys.stderr),
        ended_by_signals(exit_code=0),
        ray_to_join(config.address, environment=environment) as ray_arguments,
    ):
        import ray

        join({**ray_arguments, "log_to_driver": True})
        try:
            least, most = config.replica_range
            gpus = gpus_or_any(config.gpus, ray.cluster_resources())
            config = config.model_copy(update={"gpus": gpus})
            if is_private(config.address):
                each = {"cpus": least * config.cpus, "gpus": least * gpus}
                check_fits(ray.cluster_resources(), **each, flags="--cpus, --gpus and --replicas")
            was_running = "SERVE_CONTROLLER_ACTOR" in _named_actors("serve")
            board_name = f"{config.name or ALONE}-{time.time_ns():016x}"  # a later command's comes after it
            secret = secrets.token_hex(32)
            replaces = bool(_boards_of(config.name or ALONE))
            url, inside = _deploy(config, board_name, secret)
            try:
                _wait_until_ready(inside, config, console, replaces=replaces)
                facts = _get(f"{inside}{Route.TEACHER}", {Header.PASSED: secret})
                where = (
                    f"{facts['ingress']} ingress, {config.replicas} replicas"
                    if most > 1
                    else f"{facts['ingress']} ingress"
                )
                said = f"teacher {config.ckpt} is ready ({where}), status page and counters at {url}/"
                console.print(said, highlight=False, soft_wrap=True, markup=False)
                print(url, file=stdout, flush=True)
                signals = count_signals()  # from here on an exception from a handler could end inside of Ray
                _wait_until_stopped(config.name or ALONE, board_name, signals, console)
                if not _wait_until_drained(board_name, config.service.drain_s, signals):
                    console.print("ends with requests that were not answered", highlight=False)
            finally:
                ignore_signals()
                # a private Ray ends with everything in it
                if not is_private(config.address) or config.cache is not None:
                    _remove(config.name or ALONE, board_name, serve_too=not was_running)
        finally:
            leave()


def _deploy(config: ServeConfig, board_name: str, secret: str) -> tuple[str, str]:
    """Asks Ray Serve for the deployment; the URL that it will have, and that of Ray Serve itself, which
    differs where the replicas end TLS.

    One of the same name is replaced, replica by replica.
    """
    from ray import serve
    from ray.serve.api import RunTarget
    from ray.serve.context import _get_global_client

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its import has set another
    host, port = config.host, config.port or free_port(config.host)
    if config.tls_cert is not None:
        host, port = "127.0.0.1", free_port("127.0.0.1")
    serve.start(
        http_options={"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S}, logging_config=QUIET
    )
    client = _get_global_client()
    assert client is not None, "serve.start connects"
    found = client.http_config
    if (found.host, found.port) != (host, port):
        if config.port != 0:
            raise ValueError(
                f"got --host {config.host} --port {port}, but Ray Serve of this cluster already listens on"
                f" {found.host}:{found.port}: give those, or --port 0 to take what there is"
            )
        port = found.port
    name, prefix = config.name or ALONE, "" if config.name is None else f"/{config.name}"
    serve.run_many(
        [
            RunTarget(
                bind(config, board_name, secret), name=name, route_prefix=prefix or "/", logging_config=QUIET
            )
        ],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    shown = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    inside = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}{prefix}"
    return inside if config.tls_cert is None else f"https://{shown}:{config.port}{prefix}", inside


def _remove(name: str, board_name: str, *, serve_too: bool) -> None:
    """Ends an application, unless another command has replaced it meanwhile; and Ray Serve, where nothing
    else runs on it."""
    import ray
    from ray import serve

    boards = _boards_of(name)
    is_replaced = max(boards | {board_name}) > board_name
    if not is_replaced:
        serve.delete(name)  # its replicas answer what they have begun
    for board in boards & {board_name} if is_replaced else boards:  # those of commands that were killed too
        ray.kill(ray.get_actor(board, namespace=NAMESPACE))
    if serve_too and not serve.status().applications:
        serve.shutdown()


def _wait_until_stopped(
    name: str, board_name: str, signals: list[int], console: rich.console.Console
) -> None:
    """Returns when somebody has asked the service to stop: over HTTP, or by a signal. Says which replicas end
    meanwhile. Raises ConnectionError where the board is gone and does not come back."""
    replicas, heard_s = set[str](), time.monotonic()
    while not signals:
        state = _ask_board(board_name, "ending")
        if state is not None:
            heard_s = time.monotonic()
            if state[0] == Ending.STOP:
                return
            running = _replicas_of(name)
            for replica in sorted(replicas - running):
                left = f"{len(running)} run, and Ray Serve starts another unless fewer are asked for"
                console.print(f"replica {replica} has ended: {left}", highlight=False, soft_wrap=True)
            replicas = running
        elif time.monotonic() - heard_s > _BOARD_LOST_S:
            raise ConnectionError(
                f"the board of this teacher does not answer since {_BOARD_LOST_S:.0f} s: look at the"
                " cluster with"
                " `ray status`, and start the teacher again"
            )
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
        return ray.get(getattr(ray.get_actor(board_name, namespace=NAMESPACE), method).remote(), timeout=10)
    except (ValueError, RayActorError, GetTimeoutError):
        return None


def _wait_until_ready(
    url: str, config: ServeConfig, console: rich.console.Console, *, replaces: bool
) -> None:
    """Waits for /readyz, and where this teacher ``replaces`` another until all of that one's replicas have
    ended: those answer too.

    Raises ConnectionError where a replica fails; says what is missing where it finds no place.
    """
    import ray
    from ray import serve

    started, said = time.monotonic(), False
    while True:
        application = serve.status().applications[config.name or ALONE]
        if (application.status == "RUNNING" or not replaces) and _answers(f"{url}{Route.READY}"):
            return
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [deployment.message for deployment in application.deployments.values()]
            raise ConnectionError(f"the teacher did not start: {_reason([application.message, *reasons])}")
        states = [
            state for deployment in application.deployments.values() for state in deployment.replica_states
        ]
        missing = what_is_missing(ray.available_resources(), cpus=config.cpus, gpus=config.gpus or 0)
        if (
            missing is not None
            and "RUNNING" not in states
            and not said
            and time.monotonic() - started > SAY_PENDING_S
        ):
            said = True
            advice = "end other jobs, add nodes, or lower --cpus and --gpus"
            console.print(f"the teacher waits for a place: {missing} free: {advice}", highlight=False)
        time.sleep(_POLL_S)


def _reason(messages: Sequence[str]) -> str:
    """What went wrong first, out of messages with tracebacks; with SALT_DEBUG all of them."""
    whole = "\n".join(messages).strip()
    errors = re.findall(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception)\b: .+)$", whole, re.MULTILINE)
    return whole if os.environ.get("SALT_DEBUG") or not errors else errors[-1]


def _replicas_of(name: str) -> set[str]:
    prefix = f"SERVE_REPLICA::{name}#"
    return {actor.rpartition("#")[2] for actor in _named_actors("serve") if actor.startswith(prefix)}


def _boards_of(name: str) -> set[str]:
    """The boards of the teachers of this name: the one of the newest command sorts last."""
    return {actor for actor in _named_actors(NAMESPACE) if actor.rpartition("-")[0] == name}


def _named_actors(namespace: str) -> list[str]:
    from ray.util import list_named_actors

    actors: Any = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace]


def _get(url: str, headers: dict[str, str]) -> dict[str, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as reply:
        return json.load(reply)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (
        urllib.error.URLError,
        OSError,
    ):  # not yet: refused, 404 before the route is known, 503 before the first forward
        return False


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port}: {error.strerror}: give another --port, or --port 0 for a"
                " free one"
            ) from error
