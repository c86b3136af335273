"""What serving costs and sharing saves, as ratios of one run. `python benchmarks/service.py --help`; results
are in benchmarks/README.md."""

import argparse
import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from serving import CostlessTeacher, make_clips, real_teacher, served, served_by_ray
from transport import PEERS, transport_rates

from salt_distill.common.config import MaskConfig, ServiceClientConfig, ServiceConfig
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.masking import mask_group
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.teacher_server.ray_serve.ingress import haproxy_environment


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["teacher", "transport", "students", "masks", "memory"])
    parser.add_argument(
        "--width", type=int, default=192, help="teacher width; depth 12, 16 frames of --crop-size pixels"
    )
    parser.add_argument("--crop-size", type=int, default=96)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--no-ray", action="store_true", help="of `teacher`: under uvicorn only, for a machine without Ray"
    )
    parser.add_argument("--minutes", type=float, default=2, help="length of `memory`")
    parser.add_argument("--rate", type=float, default=200, help="most clips a second of `memory`")
    for name in PEERS:
        parser.add_argument(
            f"--{name.lower()}",
            metavar="PYTHON",
            help=f"of `transport`: the Python of an environment with {name}",
        )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"teacher": teacher, "transport": transport, "students": students, "masks": masks, "memory": memory}[
        arguments.what
    ](arguments)


def teacher(arguments):
    """Served over in-process clips/s, for a real teacher, in turns."""
    size = (arguments.width, arguments.crop_size)
    with ExitStack() as stack:
        in_process = LocalTargets(real_teacher(*size), "float16")
        stack.callback(in_process.close)
        urls = {"uvicorn": stack.enter_context(served(real_teacher, *size))[0]}
        if not arguments.no_ray:
            urls["Ray Serve, HAProxy"] = stack.enter_context(
                served_by_ray(haproxy_environment(ServiceConfig().header_timeout_s), real_teacher, *size)
            )[0]
        sources = {
            name: ServiceTargets(url, "float16", ServiceClientConfig(), "benchmark")
            for name, url in urls.items()
        }
        ways = {"in-process": in_process}
        for name, source in sources.items():
            stack.callback(source.close)
            ways |= {f"served, {name}": source, f"from memory, {name}": source}
        rates = {name: [] for name in ways}
        for number in range(arguments.rounds + 1):
            clips = make_clips(arguments.clips, in_process.spec.clip_shape, seed=number)
            for name, targets in ways.items():
                started = time.perf_counter()
                targets.request(clips).result()
                if number:  # the first round warms up
                    rates[name].append(len(clips.digests) / (time.perf_counter() - started))
        for name, url in urls.items():
            print(f"{name}: forwards {get(url, '/v1/teacher')['counters']['batch_fill']:.3f} full")
    show(rates, "in-process")


def transport(arguments):
    """Targets of 3.2 MB out of memory, over a uvicorn app that sends as many bytes and does nothing else."""
    pythons = {name: getattr(arguments, name.lower()) for name in PEERS}
    show(transport_rates(pythons, clips=arguments.clips, rounds=arguments.rounds), "bare uvicorn")
    for name, python in pythons.items():
        if python is None:
            package = name.lower()
            print(
                f"{name}: not at hand. python3 -m venv X && X/bin/pip install {package}, then --{package}"
                " X/bin/python"
            )


def students(arguments):
    """Students of one data seed: forwards per distinct clip, and bytes uploaded over those of one student."""
    bytes_of_one = None
    for count in (1, 2, 4):
        with served(real_teacher, 64, 64) as (url, _):
            sources = [
                ServiceTargets(url, "float16", ServiceClientConfig(), f"student-{number}")
                for number in range(count)
            ]
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
        ratios = (
            f"{counters['clips_computed'] / distinct:.2f} forwards per distinct clip,"
            f" {bytes_up / bytes_of_one:.3f} of the bytes up"
        )
        print(f"{count} students: {ratios}, {counters['clips_served']} targets")


def masks(arguments):
    """Share of a target that travels where a request names the masked tokens: the union of the paper's mask
    sets."""
    grid = TokenGrid(8, 14, 14)
    shares = []
    for step in range(100):
        group = mask_group(MaskConfig(), grid, seed=0, step=step, group=0, batch_size=24)
        shares += [len(token_idx) / grid.num_tokens for token_idx in group.hidden_by_any(grid.num_tokens)]
    print(
        f"masked tokens of both mask sets: {np.mean(shares):.3f} of {grid.num_tokens} tokens, over 100 steps"
        " of 24 clips"
    )


def memory(arguments):
    """Resident memory of a service whose every clip is new, from a teacher that costs nothing; a quarter of
    the time is warm-up."""
    with served(CostlessTeacher, (2, 4, 4), 64, memory_bytes=4_000_000) as (url, pid):
        source = ServiceTargets(url, "float16", ServiceClientConfig(), "load")
        at_start = resident_bytes(pid)
        samples, started, num_clips = [], time.monotonic(), 0
        while (elapsed_s := time.monotonic() - started) < 60 * arguments.minutes:
            time.sleep(max(0.0, num_clips / arguments.rate - elapsed_s))
            source.request(make_clips(32, source.spec.clip_shape, seed=num_clips)).result()
            num_clips += 32
            samples.append((num_clips, resident_bytes(pid)))
        source.close()
    each = len(samples) // 12
    warm, end = (np.mean(part, axis=0) for part in (samples[len(samples) // 4 :][:each], samples[-each:]))
    growth = (end[1] - warm[1]) / (end[0] - warm[0])  # bytes a clip, and so MB a million clips
    print(
        f"{num_clips} clips in {arguments.minutes:g} minutes, {num_clips / 60 / arguments.minutes:.0f} a"
        " second"
    )
    print(
        f"resident: {at_start / 1e6:.1f} MB at the start, {warm[1] / 1e6:.1f} after warm-up,"
        f" {end[1] / 1e6:.1f} at the end"
    )
    print(f"growth after warm-up: {growth:.1f} MB per million clips")


def get(url, path):
    with urllib.request.urlopen(url + path) as reply:
        return json.load(reply)


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show(rates, base):
    """Medians; the ratio is the median of those of each round, in which all ways had their turn."""
    for name, values in rates.items():
        ratio = np.median(np.divide(values, rates[base]))
        print(
            f"{name:32} {np.median(values):8.1f} clips/s ({min(values):.1f}-{max(values):.1f})   {ratio:5.2f}"
            f" of {base}"
        )


if __name__ == "__main__":
    main()
