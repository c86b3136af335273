"""What serving costs and sharing saves, as ratios of one run. `python benchmarks/service.py --help`; results are in benchmarks/README.md."""

import argparse
import http.client
import json
import multiprocessing
import os
import sys
import threading
import time
import urllib.parse
import urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import uvicorn

from common.clip import ClipBatch, clip_digest
from common.config import EncoderConfig, MaskConfig, ServiceClientConfig, ServiceConfig, TeacherComputeConfig, ViewConfig
from common.local_ray import ray_to_join
from common.model.frozen import FrozenEncoder
from common.model.grid import TokenGrid
from common.model.masking import mask_group
from common.model.teacher import Teacher, TeacherSpec
from common.model.vit import Encoder, init_weights
from common.targets import wire
from student_trainer.service_targets import ServiceTargets
from student_trainer.target_source import LocalTargets
from teacher_server.ingress import free_port, haproxy_environment, let_proxy_send_views
from teacher_server.service import build_app

BODY_CLIPS = 8
CONNECTIONS = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["teacher", "transport", "students", "masks", "memory"])
    parser.add_argument("--width", type=int, default=192, help="teacher width; depth 12, 16 frames of --crop-size pixels")
    parser.add_argument("--crop-size", type=int, default=96)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120, help="length of `memory`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"teacher": teacher, "transport": transport, "students": students, "masks": masks, "memory": memory}[arguments.what](arguments)


def teacher(arguments):
    """Served over in-process clips/s, for a real teacher."""
    with served(real_teacher, arguments.width, arguments.crop_size) as (url, _):
        in_process = LocalTargets(real_teacher(arguments.width, arguments.crop_size), "float16")
        source = ServiceTargets(url, "float16", ServiceClientConfig(), "benchmark")
        rates = {"in-process": [], "served, first time": [], "served, from memory": []}
        for number in range(arguments.rounds):
            clips = make_clips(arguments.clips, in_process.spec.clip_shape, seed=number)
            for name, targets in zip(rates, (in_process, source, source), strict=True):
                started = time.perf_counter()
                targets.request(clips).result()
                rates[name].append(len(clips.digests) / (time.perf_counter() - started))
        source.close()
        in_process.close()
    show(rates, "in-process", "clips/s")


def transport(arguments):
    """Targets of 3.2 MB out of memory, by every way to the replica, over a uvicorn app that sends as many bytes and does nothing else."""
    rates = {}
    with served(None) as (url, _):
        rates["bare uvicorn"] = [carry(url, None, arguments) for _ in range(arguments.rounds)]
    with served(CostlessTeacher) as (url, _):
        rates["the service under uvicorn"] = measure(url, arguments)
    for name, environment in (("Ray Serve, HAProxy", haproxy_environment()), ("Ray Serve, its Python proxy", {})):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # Ray's token is a process's for life
            rates.update(pool.submit(ray_rates, name, environment, arguments).result())
    show(rates, "bare uvicorn", "clips/s")


def ray_rates(name, environment, arguments):
    with under_ray(environment) as (url, direct_url):
        rates = {name: measure(url, arguments)}
        return rates if direct_url is None else rates | {"Ray Serve, direct ingress": measure(direct_url, arguments)}


def students(arguments):
    """Students of one data seed: forwards per distinct clip, and bytes uploaded over those of one student."""
    bytes_of_one = None
    for count in (1, 2, 4):
        with served(real_teacher, 64, 64) as (url, _):
            sources = [ServiceTargets(url, "float16", ServiceClientConfig(), f"student-{number}") for number in range(count)]
            shape = sources[0].spec.clip_shape
            with ThreadPoolExecutor(count) as pool:
                for number in range(arguments.rounds):
                    batch = make_clips(arguments.clips, shape, seed=number)
                    list(pool.map(lambda source, batch=batch: source.request(batch).result(), sources))
            counters = get(url, "/v1/teacher")["counters"]
            bytes_up = sum(source.counters()["bytes_up"] for source in sources)
            bytes_of_one = bytes_of_one or bytes_up
            for source in sources:
                source.close()
        distinct = arguments.clips * arguments.rounds
        ratios = f"{counters['clips_computed'] / distinct:.2f} forwards per distinct clip, {bytes_up / bytes_of_one:.3f} of the bytes up"
        print(f"{count} students: {ratios}, {counters['clips_served']} targets")


def masks(arguments):
    """Share of a target that travels where a request names the masked tokens: the union of the paper's mask sets."""
    grid = TokenGrid(8, 14, 14)
    shares = []
    for step in range(100):
        group = mask_group(MaskConfig(), grid, seed=0, step=step, group=0, batch_size=24)
        shares += [len(token_idx) / grid.num_tokens for token_idx in group.hidden_by_any(grid.num_tokens)]
    print(f"masked tokens of both mask sets: {np.mean(shares):.3f} of {grid.num_tokens} tokens, over 100 steps of 24 clips")


def memory(arguments):
    """Resident memory of the server under a load of clips that nobody has seen, in megabytes."""
    with served(real_teacher, 64, 64, memory_bytes=50_000_000) as (url, pid):
        source = ServiceTargets(url, "float16", ServiceClientConfig(), "load")
        samples, started, number = [], time.monotonic(), 0
        while time.monotonic() - started < arguments.seconds:
            source.request(make_clips(32, source.spec.clip_shape, seed=number)).result()
            number += 1
            samples.append(resident_bytes(pid) / 1e6)
        source.close()
    quarter = len(samples) // 4
    quarters = [np.mean(samples[first * quarter : (first + 1) * quarter]) for first in range(4)]
    print(f"{32 * number} clips in {arguments.seconds:.0f} s; MB resident in each quarter: {', '.join(f'{mean:.0f}' for mean in quarters)}")


class CostlessTeacher:
    """Targets of a ViT-L's size that cost nothing."""

    def __init__(self):
        compute = {"device": "none", "dtype": "float32", "batch_size": BODY_CLIPS, "torch": torch.__version__, "compiled": False}
        self.spec = TeacherSpec(
            name="costless",
            fingerprint="0" * 64,
            compute=compute,
            clip_shape=(2, 16, 16, 3),
            grid=(8, 14, 14),
            width=1024,
            num_parameters=0,
        )
        self._target = torch.randn(1, 1568, 1024)

    def forward(self, clips):
        return self._target.expand(len(clips), -1, -1)


def real_teacher(width, crop_size):
    config = EncoderConfig(width=width, depth=12, num_heads=width // 64, mlp_width=4 * width)
    encoder = Encoder(config)
    init_weights(encoder, torch.Generator().manual_seed(0), std=0.02)
    frozen = FrozenEncoder(name="benchmark", config=config, view=ViewConfig(crop_size=crop_size), load=lambda: encoder)
    return Teacher(frozen, TeacherComputeConfig())


def make_clips(count, shape, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    digests = tuple(clip_digest(clip) for clip in pixels)
    keys = tuple(str(number) for number in range(count))
    return ClipBatch(pixels=pixels, digests=digests, keys=keys, views=(0,) * count, good=np.ones(count, bool))


@contextmanager
def served(make_teacher, *arguments, **service):
    """URL and process of an app under uvicorn in a process of its own. ``make_teacher``: None for the bare app."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, make_teacher, arguments, service))
    process.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    try:
        if make_teacher is not None:
            while http_status(url, "/readyz") != 200:
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.join()


def serve(pipe, make_teacher, arguments, service):
    torch.set_num_threads(1)
    app = bare_app if make_teacher is None else build_app(make_teacher(*arguments), ServiceConfig(**service))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=lambda: pipe.send(port_of(server)))
    thread.start()
    server.run()


def port_of(server):
    while not server.started:
        time.sleep(0.05)
    return server.servers[0].sockets[0].getsockname()[1]


BARE_BODY = bytes(BODY_CLIPS * 1568 * 1024 * 2)


async def bare_app(scope, receive, send):
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(BARE_BODY)).encode())]})
    await send({"type": "http.response.body", "body": BARE_BODY})


@contextmanager
def under_ray(environment):
    """The costless teacher on a private Ray Serve: its URL, and that of the replica itself where it listens."""
    with ray_to_join(None, environment) as ray_arguments:
        import ray
        from ray import serve as ray_serve

        class Replica:
            def __serve_build_asgi_app__(self):
                let_proxy_send_views()
                return build_app(CostlessTeacher(), ServiceConfig())

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a program
        ray.init(**ray_arguments)
        try:
            port = free_port("127.0.0.1")
            ray_serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
            deployment = ray_serve.deployment(ray_serve.ingress()(Replica), name="costless", max_ongoing_requests=100)
            ray_serve.run(deployment.bind(), name="costless", route_prefix="/")
            url = f"http://127.0.0.1:{port}"
            while http_status(url, "/readyz") != 200:
                time.sleep(0.2)
            direct = os.environ.get("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT")
            yield url, None if direct is None else f"http://127.0.0.1:{direct}"
        finally:
            ray.shutdown()


def measure(url, arguments):
    """Clips/s of targets that the service has in memory, a figure a round."""
    clips = make_clips(BODY_CLIPS, (2, 16, 16, 3), seed=0)
    rows = zip(clips.digests, clips.pixels, strict=True)
    upload = wire.write_request("float16", [wire.RequestRow(clip_digest=digest, clip=pixels.tobytes()) for digest, pixels in rows])
    exchange(connect(url), bytearray(30_000_000), upload)
    asking = wire.write_request("float16", [wire.RequestRow(clip_digest=digest) for digest in clips.digests])
    return [carry(url, asking, arguments) for _ in range(arguments.rounds)]


def carry(url, body, arguments):
    """Clips/s of answers read into buffers that are there already, by several connections."""
    each = max(1, arguments.clips // BODY_CLIPS // CONNECTIONS)

    def reader(_):
        connection, buffer = connect(url), bytearray(30_000_000)
        for _ in range(each):
            exchange(connection, buffer, body)
        connection.close()

    started = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(reader, range(CONNECTIONS)))
    return CONNECTIONS * each * BODY_CLIPS / (time.perf_counter() - started)


def connect(url):
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)


def exchange(connection, buffer, body):
    content = None if body is None else memoryview(body)
    connection.request("POST", "/v1/targets", body=content, headers={"Content-Type": wire.CONTENT_TYPE})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    view, done = memoryview(buffer), 0
    while got := response.readinto(view[done:]):
        done += got
    assert done >= len(BARE_BODY)


def http_status(url, path):
    try:
        connection = connect(url)
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None


def get(url, path):
    with urllib.request.urlopen(url + path) as reply:
        return json.load(reply)


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show(rates, base, unit):
    reference = np.median(rates[base])
    for name, values in rates.items():
        spread = f"{min(values):.1f}-{max(values):.1f}"
        print(f"{name:28} {np.median(values):8.1f} {unit} ({spread})   {np.median(values) / reference:5.2f} of {base}")


if __name__ == "__main__":
    main()
