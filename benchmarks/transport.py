"""Targets of 3.2 MB out of memory, eight in a body, by every way to the service and by its peers, in
turns."""

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from serving import (
    BARE_BODY,
    BODY_CLIPS,
    CostlessTeacher,
    connect,
    make_clips,
    served,
    served_by_ray,
    wait_until_ready,
)

from salt_distill.common.config import ServiceConfig
from salt_distill.common.protocol import ARROW_TYPE
from salt_distill.common.targets import wire
from salt_distill.teacher_server.ray_serve.ingress import free_port, haproxy_environment

CONNECTIONS = 4
PEERS = {"LitServe": ("litserve", "/health"), "BentoML": ("bentoml", "/readyz")}


def transport_rates(
    peer_pythons: dict[str, str | None], *, clips: int, rounds: int
) -> dict[str, list[float]]:
    """Clips/s of each way, a figure a round. ``peer_pythons``: for each of ``PEERS`` the Python that has it,
    or None."""
    with ExitStack() as stack:
        asked: dict[str, tuple[str, bytes, str]] = {}
        url, _ = stack.enter_context(served(None))
        asked["bare uvicorn"] = (url, b"", ARROW_TYPE)
        url, _ = stack.enter_context(served(CostlessTeacher))
        asked["the service under uvicorn"] = (url, upload(url), ARROW_TYPE)
        haproxy, direct = stack.enter_context(
            served_by_ray(haproxy_environment(ServiceConfig().header_timeout_s), CostlessTeacher)
        )
        asked["Ray Serve, HAProxy"] = (haproxy, upload(haproxy), ARROW_TYPE)
        if direct is not None:
            asked["Ray Serve, direct ingress"] = (direct, upload(direct), ARROW_TYPE)
        proxy, _ = stack.enter_context(served_by_ray({}, CostlessTeacher))
        asked["Ray Serve, its Python proxy"] = (proxy, upload(proxy), ARROW_TYPE)
        for name, python in peer_pythons.items():
            if python is not None:
                url = stack.enter_context(peer(*PEERS[name], python))
                asked[name] = (url, json.dumps({"clips": BODY_CLIPS}).encode(), "application/json")
        for way in asked.values():
            carry(*way, clips=CONNECTIONS * BODY_CLIPS)
        rates: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(rounds):
            for name, way in asked.items():
                rates[name].append(carry(*way, clips=clips))
        return rates


@contextmanager
def peer(name: str, health: str, python: str):
    """URL of a peer. See peers.py."""
    port = free_port("127.0.0.1")
    command = [python, str(Path(__file__).with_name("peers.py")), name, str(port)]
    environment = {**os.environ, "PYTHONPATH": "", "BENTOML_DO_NOT_TRACK": "True"}
    process = subprocess.Popen(
        command, start_new_session=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", health)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def upload(url: str) -> bytes:
    """A request for targets that the service has in memory from now on."""
    clips = make_clips(BODY_CLIPS, (2, 16, 16, 3), seed=0)
    rows = zip(clips.digests, clips.pixels, strict=True)
    body = wire.write_request(
        "float16", [wire.RequestRow(clip_digest=digest, clip=pixels.tobytes()) for digest, pixels in rows]
    )
    exchange(connect(url), bytearray(30_000_000), b"".join(body), ARROW_TYPE)
    return b"".join(
        wire.write_request("float16", [wire.RequestRow(clip_digest=digest) for digest in clips.digests])
    )


def carry(url: str, body: bytes, content_type: str, *, clips: int) -> float:
    """Clips/s of answers read into buffers that are there already, by several connections."""
    each = max(1, clips // BODY_CLIPS // CONNECTIONS)

    def reader(_):
        connection, buffer = connect(url), bytearray(30_000_000)
        for _ in range(each):
            exchange(connection, buffer, body, content_type)
        connection.close()

    started = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(reader, range(CONNECTIONS)))
    return CONNECTIONS * each * BODY_CLIPS / (time.perf_counter() - started)


def exchange(connection, buffer, body, content_type):
    connection.request("POST", "/v1/targets", body=body, headers={"Content-Type": content_type})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    view, done = memoryview(buffer), 0
    while got := response.readinto(view[done:]):
        done += got
    assert done >= len(BARE_BODY)
