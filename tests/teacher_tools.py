"""A real teacher of a few thousand weights, its service under uvicorn, and clips: what the tests of targets,
server and client share."""

import contextlib
import json
import subprocess
import threading
import urllib.request
from pathlib import Path

import numpy as np
import torch
import uvicorn

from salt_distill.common.clip import ClipBatch, clip_digest
from salt_distill.common.config import (
    EncoderConfig,
    MaskConfig,
    PredictorConfig,
    ServiceConfig,
    TeacherComputeConfig,
    ViewConfig,
)
from salt_distill.common.model.checkpoint import CheckpointConfig, new_predictor, save_checkpoint
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.model.vit import Encoder
from salt_distill.teacher_server.http.service import build_app

VIEW = ViewConfig(num_frames=4, frame_step=1, crop_size=16)
ENCODER = EncoderConfig(width=24, depth=1, num_heads=2, mlp_width=48, patch_size=8)
BATCH_SIZE = 4


def save_teacher(directory: Path, seed: int = 0) -> Path:
    """A checkpoint with random weights."""
    config = CheckpointConfig(
        objective="vpixel",
        step=0,
        encoder=ENCODER,
        predictor=PredictorConfig(width=12, depth=1, num_heads=1, mlp_width=24),
        predictor_out_width=8 * 8 * 2 * 3,
        view=VIEW,
        mask=MaskConfig(),
    )
    torch.manual_seed(seed)
    encoder = Encoder(ENCODER)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(
        directory,
        config,
        {"model": encoder.state_dict(), "predictor": new_predictor(config).state_dict()},
        {},
    )
    return directory


def load_teacher(directory: Path, seed: int = 0) -> Teacher:
    """The teacher in such a checkpoint, on the CPU."""
    compute = TeacherComputeConfig(batch_size=BATCH_SIZE)
    return Teacher.load(save_teacher(directory / f"teacher-{seed}", seed), compute, torch.device("cpu"))


def new_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine that has signed itself, and its key."""
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(
        [*command, *names, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )
    return folder / "cert.pem", folder / "key.pem"


def runs_on_board(url: str) -> list[dict]:
    """``GET /v1/runs``."""
    with urllib.request.urlopen(f"{url}/v1/runs") as answer:
        return json.load(answer)


def random_clips(count: int, seed: int = 0) -> np.ndarray:
    """Clips that share no bytes."""
    return np.random.default_rng(seed).integers(0, 256, (count, *VIEW.clip_shape), dtype=np.uint8)


def batch_of(pixels: np.ndarray, bad: tuple[int, ...] = ()) -> ClipBatch:
    """A batch as a reader gives it."""
    good = np.ones(len(pixels), bool)
    good[list(bad)] = False
    pixels = np.where(good[:, None, None, None, None], pixels, 0).astype(np.uint8)
    return ClipBatch(
        pixels=pixels,
        digests=tuple(clip_digest(clip) for clip in pixels),
        keys=tuple(f"source/{number}" for number in range(len(pixels))),
        views=(0,) * len(pixels),
        good=good,
    )


@contextlib.contextmanager
def serving(
    teacher,
    *,
    around=lambda app: app,
    port=0,
    context=None,
    cache=None,
    tokens=None,
    request_log=None,
    **service,
):
    """The URL of a teacher's app under uvicorn, in a thread, and its ``TeacherService``. ``around``: what
    stands before the app."""
    app = build_app(teacher, ServiceConfig(**service), context, cache, tokens=tokens, request_log=request_log)
    server = uvicorn.Server(
        uvicorn.Config(
            around(app), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=2
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not (server.started and app.state.service.ready):
            assert thread.is_alive(), "the server ended before it was ready"
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app.state.service
    finally:
        server.should_exit = True
        thread.join()
