"""The teacher's deployment in Ray Serve: the replica that owns the model is itself the HTTP ingress."""

import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salt_distill.common.config import ServeConfig
from salt_distill.teacher_server.http.access import check_access

if TYPE_CHECKING:
    from ray.serve import Application

ALONE = "teacher"
"""Name of the application of a teacher without `--name`."""
NAMESPACE = "salt"
"""Where Ray keeps the boards."""
_MAX_ONGOING_REQUESTS = 1000
"""Requests inside a replica, where they wait for the teacher and for each other. What bounds them is bytes:
max_pending_bytes."""
_MARK = 0.001
"""What a replica takes of `--resource`, which says where it runs and does not run out."""
QUIET = {"log_level": "ERROR", "enable_access_log": False}


class Replica:
    """One replica: loads the teacher, and is the ASGI app that Ray Serve's ingress calls."""

    def __init__(self, values: dict[str, Any], board_name: str, secret: str) -> None:
        import ray
        import torch

        from salt_distill.common.model.checkpoint import open_encoder
        from salt_distill.common.model.teacher import Teacher
        from salt_distill.teacher_server.http.listener import Tls, tls_socket
        from salt_distill.teacher_server.http.replica import ReplicaContext
        from salt_distill.teacher_server.http.service import board_arguments, build_app
        from salt_distill.teacher_server.ray_serve.ingress import (
            bound_heads,
            ingress_here,
            let_proxy_send_views,
            listen_on,
        )

        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        let_proxy_send_views()
        config = ServeConfig.model_validate(values)
        teacher = Teacher(
            open_encoder(config), config.teacher, torch.device("cuda" if config.gpus else "cpu")
        )
        file = None if config.board_file is None else Path(config.board_file)
        board: Any = _ActorBoard(
            board_name, {**board_arguments(teacher.spec, config.service), "file": file, "secret": secret}
        )
        here = ray.get_runtime_context().get_node_id()
        [host] = [
            node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here
        ]  # of a private Ray: 127.0.0.1
        listen_on(host)
        bound_heads()
        listener = socket.create_server((host, 0))
        front = None
        if config.tls_cert is not None and config.tls_key is not None:
            front = tls_socket(config.host, config.port), Tls(cert=config.tls_cert, key=config.tls_key)
        context = ReplicaContext(
            board=board,
            url=f"http://{host}:{listener.getsockname()[1]}",
            listener=listener,
            front=front,
            buckets=config.replica_range[1],
            ingress=ingress_here() if front is None else "direct",
        )
        files = {
            name: None if (value := getattr(config, name)) is None else Path(value)
            for name in ("cache", "tokens", "request_log")
        }
        self._app = build_app(teacher, config.service, context, **files)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def check_health(self) -> None:
        """Raises where the batcher has ended; Ray Serve then replaces the replica."""
        self._app.state.service.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas follows: see salt_distill.teacher_server.ray_serve.scaling."""
        return {"waiting_clips": self._app.state.service.batcher.queued_clips}


class _ActorBoard:
    """The board of a teacher's replicas, a Ray actor that whoever comes first starts. Where it dies, another
    takes its place, with its file."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        import ray

        from salt_distill.teacher_server.board.board import Board

        options: Any = {"name": name, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
        self._actor = (
            ray.remote(Board)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=3, **options)
            .remote(**arguments)
        )

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        from ray.exceptions import RayActorError

        async def call(*values: Any, **named: Any) -> Any:
            try:
                return await getattr(self._actor, method).remote(*values, **named)
            except RayActorError as error:
                raise ConnectionError(f"the board of this teacher does not answer: {error}") from error

        return call


def application(config: ServeConfig) -> "Application":
    """The service for a configuration file of Ray Serve, whose ``args`` are the values of ``salt-serve
    teacher``: for who runs Serve himself."""
    check_access(config)
    return bind(config, f"{config.name or ALONE}-{time.time_ns():016x}", secrets.token_hex(32))


def bind(config: ServeConfig, board_name: str, secret: str) -> "Application":
    """The deployment of the replicas, whose board has a name and whose ports a secret."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    from salt_distill.teacher_server.ray_serve.scaling import WaitingClips

    least, most = config.replica_range
    scaling = None
    if least < most:
        policy = AutoscalingPolicy(
            policy_function=WaitingClips,
            policy_kwargs={"clips_per_replica": config.service.clips_per_replica},
        )
        scaling = AutoscalingConfig(min_replicas=least, max_replicas=most, policy=policy, upscale_delay_s=10)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=ALONE,
        num_replicas=None if scaling is not None else least,
        autoscaling_config=scaling,
        ray_actor_options={
            "num_cpus": config.cpus,
            "num_gpus": config.gpus,
            "resources": {} if config.resource is None else {config.resource: _MARK},
        },
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        health_check_period_s=10,
        graceful_shutdown_timeout_s=config.service.drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=QUIET,
    )
    return deployment.bind(config.model_dump(mode="json"), board_name, secret)
