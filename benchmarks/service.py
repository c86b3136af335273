"""Served over in-process clips/s, and what memory saves: one teacher, one client, one run. `python benchmarks/service.py --help`."""

import argparse
import threading
import time

import numpy as np
import torch
import uvicorn

from common.clip import ClipBatch, clip_digest
from common.config import EncoderConfig, ServiceClientConfig, ServiceConfig, TeacherComputeConfig, ViewConfig
from common.model.frozen import FrozenEncoder
from common.model.teacher import Teacher
from common.model.vit import Encoder, init_weights
from student_trainer.service_targets import ServiceTargets
from student_trainer.target_source import LocalTargets
from teacher_server.service import build_app


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=192, help="teacher width; depth 12, 16 frames of --crop-size pixels")
    parser.add_argument("--crop-size", type=int, default=96)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    teacher = make_teacher(arguments.width, arguments.crop_size)
    app = build_app(teacher, ServiceConfig(), None)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    served = ServiceTargets(url, "float16", ServiceClientConfig(), "benchmark")
    local = LocalTargets(teacher, "float16")
    rates: dict[str, list[float]] = {"in-process": [], "served, first time": [], "served, from memory": []}
    for number in range(arguments.rounds):
        clips = make_clips(arguments.clips, teacher.spec.clip_shape, seed=number)
        for name, source in (("in-process", local), ("served, first time", served), ("served, from memory", served)):
            started = time.perf_counter()
            source.request(clips).result()
            rates[name].append(len(clips.digests) / (time.perf_counter() - started))
    base = np.median(rates["in-process"])
    target_bytes = teacher.spec.num_tokens * teacher.spec.width * 2
    print(f"{teacher.spec.compute['device']}, {target_bytes / 1e6:.2f} MB a target")
    for name, values in rates.items():
        print(f"{name:22} {np.median(values):8.1f} clips/s   {np.median(values) / base:6.2f} of in-process")
    served.close()
    local.close()
    server.should_exit = True
    thread.join()


def make_teacher(width: int, crop_size: int) -> Teacher:
    config = EncoderConfig(width=width, depth=12, num_heads=width // 64, mlp_width=4 * width)
    encoder = Encoder(config)
    init_weights(encoder, torch.Generator().manual_seed(0), std=0.02)
    frozen = FrozenEncoder(name="benchmark", config=config, view=ViewConfig(crop_size=crop_size), load=lambda: encoder)
    return Teacher(frozen, TeacherComputeConfig())


def make_clips(count: int, shape: tuple[int, int, int, int], seed: int) -> ClipBatch:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return ClipBatch(
        pixels=pixels,
        digests=tuple(clip_digest(clip) for clip in pixels),
        keys=tuple(str(number) for number in range(count)),
        views=(0,) * count,
        good=np.ones(count, bool),
    )


if __name__ == "__main__":
    main()
