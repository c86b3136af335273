"""Teachers, and ways to serve them, each in a process of its own: what the benchmarks of the service
share."""

import http.client
import multiprocessing
import os
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import torch
import uvicorn

from salt_distill.common.clip import ClipBatch, clip_digest
from salt_distill.common.config import EncoderConfig, ServiceConfig, TeacherComputeConfig, ViewConfig
from salt_distill.common.local_ray import ray_to_join
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.teacher import Teacher, TeacherSpec
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.teacher_server.http.service import build_app
from salt_distill.teacher_server.ray_serve.ingress import free_port, let_proxy_send_views

BODY_CLIPS = 8
BARE_BODY = b"\1" * (
    BODY_CLIPS * 1568 * 1024 * 2
)  # not zeros: those would be one page of memory, read again and again


class CostlessTeacher:
    """Targets that cost nothing; of a ViT-L's size unless told otherwise."""

    def __init__(self, grid: tuple[int, int, int] = (8, 14, 14), width: int = 1024) -> None:
        compute = {
            "device": "none",
            "dtype": "float32",
            "batch_size": BODY_CLIPS,
            "torch": torch.__version__,
            "compiled": False,
        }
        self.spec = TeacherSpec(
            name="costless",
            fingerprint="0" * 64,
            compute=compute,
            clip_shape=(2, 16, 16, 3),
            grid=grid,
            width=width,
            num_parameters=0,
        )
        self.clip_flops = 0.0
        self._target = torch.randn(1, self.spec.num_tokens, width)

    def forward(self, clips):
        return self._target.expand(len(clips), -1, -1)


def real_teacher(width: int, crop_size: int) -> Teacher:
    """Twelve blocks with random weights, on a GPU if there is one."""
    config = EncoderConfig(width=width, depth=12, num_heads=width // 64, mlp_width=4 * width)
    encoder = Encoder(config)
    init_weights(encoder, torch.Generator().manual_seed(0), std=0.02)
    frozen = FrozenEncoder(
        name="benchmark", config=config, view=ViewConfig(crop_size=crop_size), load=lambda: encoder
    )
    return Teacher(frozen, TeacherComputeConfig())


def make_clips(count: int, shape: tuple[int, ...], seed: int) -> ClipBatch:
    """Clips that nobody has seen."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    digests = tuple(clip_digest(clip) for clip in pixels)
    keys = tuple(str(number) for number in range(count))
    return ClipBatch(pixels=pixels, digests=digests, keys=keys, views=(0,) * count, good=np.ones(count, bool))


@contextmanager
def served(make_teacher: Callable | None, *arguments, **service):
    """URL and process of an app under uvicorn. ``make_teacher``: None for the bare app."""
    with _process(_serve, make_teacher, arguments, service) as (url, process):
        if make_teacher is not None:
            wait_until_ready(url)
        yield url, process.pid


@contextmanager
def served_by_ray(environment: dict[str, str], make_teacher: Callable, *arguments):
    """URL of a private Ray Serve, and that of its replica where it listens itself. In another process: Ray's
    token is a process's for life."""
    with _process(_serve_by_ray, environment, make_teacher, arguments) as (urls, _):
        yield urls


def wait_until_ready(url: str, path: str = "/readyz") -> None:
    while http_status(url, path) != 200:
        time.sleep(0.2)


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)


def http_status(url: str, path: str) -> int | None:
    try:
        connection = connect(url)
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None


@contextmanager
def _process(target: Callable, *arguments):
    """What a process says first, and the process. It ends when its pipe does."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield ours.recv(), process
    finally:
        ours.close()
        process.join()


def _serve(pipe: Connection, make_teacher: Callable | None, arguments: tuple, service: dict) -> None:
    torch.set_num_threads(1)
    app = bare_app if make_teacher is None else build_app(make_teacher(*arguments), ServiceConfig(**service))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    pipe.send(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    _wait_for_end(pipe)
    server.should_exit = True
    thread.join()


def _serve_by_ray(
    pipe: Connection, environment: dict[str, str], make_teacher: Callable, arguments: tuple
) -> None:
    with ray_to_join(None, environment) as ray_arguments:
        import ray
        from ray import serve as ray_serve

        class Replica:
            def __serve_build_asgi_app__(self):
                let_proxy_send_views()
                torch.set_num_threads(1)
                return build_app(make_teacher(*arguments), ServiceConfig())

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a program
        ray.init(**ray_arguments)
        try:
            port = free_port("127.0.0.1")
            ray_serve.start(
                http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"}
            )
            deployment = ray_serve.deployment(
                ray_serve.ingress()(Replica), name="benchmark", max_ongoing_requests=100
            )
            ray_serve.run(deployment.bind(), name="benchmark", route_prefix="/")
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url)
            direct = os.environ.get("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT")
            pipe.send((url, None if direct is None else f"http://127.0.0.1:{direct}"))
            _wait_for_end(pipe)
        finally:
            ray.shutdown()


def _wait_for_end(pipe: Connection) -> None:
    try:
        pipe.recv()
    except EOFError:  # the other end is closed
        return


async def bare_app(scope, receive, send):
    """Sends the bytes of a body of targets, and does nothing else."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", str(len(BARE_BODY)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": BARE_BODY})
