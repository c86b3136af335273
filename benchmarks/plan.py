"""What `salt-plan` predicts over what real runs do: served to one and two students, cached, in process. `python benchmarks/plan.py`; results are in
docs/planning.md.

A device is a core here: a student has one and the teacher has one. Where a student and its teacher share a device, and where a cache leaves no
teacher, the run is kept on one core. Reading a clip takes its time from the student's core, so it counts as part of its step.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.config import LoaderConfig, PlanConfig, StudentRun, preset_layer
from common.data.reader import Reader
from common.plan.facts import gather
from common.plan.show import plan

MAINS = {"salt-data": "common.data.cli", "salt-train": "student_trainer.cli", "salt-serve": "teacher_server.cli"}
NUM_VIDEOS = 480
WARM_UP_STEPS = 40
"""The first pass decodes; later ones have the frames in memory."""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=140, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        salt("salt-data", "synth", "videos", "--num-train", NUM_VIDEOS, "--num-test", 8)
        salt("salt-data", "pack", "videos", "shards")
        salt("salt-train", "teacher", "--data", "shards", "--out", "teacher", *flags(12))
        salt("salt-serve", "precompute", "--ckpt", "teacher", "--data", "shards", "--views", 1, "--out", "targets")
        ratios = {}
        for number in range(arguments.rounds):
            speeds = measure()
            print(json.dumps({"round": number, "load": os.getloadavg()[0], **speeds}), flush=True)
            found = {name: run(name, arguments.steps, f"{number}-{name}") for name in RUNS}
            for name, clips_per_s in found.items():
                predicted = predict(name, **speeds)
                ratios.setdefault(name, []).append(predicted / clips_per_s)
                line = {"run": name, "predicted": predicted, "measured": clips_per_s, "ratio": predicted / clips_per_s}
                print(json.dumps(line), flush=True)
    print("predicted over measured, median of the rounds (least to most)")
    for name, of_rounds in ratios.items():
        print(f"{name}: {statistics.median(of_rounds):.2f} ({min(of_rounds):.2f} to {max(of_rounds):.2f})")


def measure():
    """Clips per second of teacher, student and reader on one core: two at a time, so that both cores are as busy as in the runs."""
    files = ["e0.json", "e1.json"]
    source = ["--teacher-ckpt", "teacher", "--preset", "nano", "--data", "none", "--out", "none", "--workers", 0]
    both = [start("salt-train", "student", *source, "--estimate", "--estimate-out", file) for file in files]
    for process in both:
        finish(process)
    estimates = [json.loads(Path(file).read_text()) for file in files]
    preset = preset_layer(StudentRun, "nano")
    config = StudentRun.model_validate({**preset, "data": "shards", "out": "none", "teacher_ckpt": "teacher"})
    with contextlib.closing(
        Reader("shards", data_seed=0, views=1, view=config.view, split="train", loader=LoaderConfig.model_validate(preset["loader"]))
    ) as reader:
        reader.clips(range(NUM_VIDEOS))
        started = time.perf_counter()
        reader.clips(range(NUM_VIDEOS, 3 * NUM_VIDEOS))
        read_s = (time.perf_counter() - started) / (2 * NUM_VIDEOS)
    rates = {part: statistics.mean(found[part]["clips_per_s"] for found in estimates) for part in ("student", "teacher")}
    return {**rates, "reader": 1 / read_s}


def predict(name, *, student, teacher, reader):
    """Clips per second of one run, by the planner."""
    runs, choice, num_devices = RUNS[name]
    config = PlanConfig(
        student=[{"preset": "nano", "runs": runs, "clips_per_s": 1 / (1 / student + 1 / reader)}],
        teacher="nano", teacher_clips_per_s=teacher, teacher_replicas=1, gpus=num_devices, samples=NUM_VIDEOS, views=1,
        link_gbps=10, decode_clips_per_s=1e6, disk_gb_per_s=1,
    )  # fmt: skip
    return next(found for found in plan(gather(config), replicas=1) if found.name == choice).binding.clips_per_s


RUNS = {
    "served, 1 student": (1, "serve", 2),
    "served, 2 students": (2, "serve", 2),
    "cached": (1, "cache", 1),
    "in process": (1, "in-process", 1),
}
"""Student runs, the planner's name of the choice, devices."""


def run(name, steps, out):
    """Clips per second of one of the real runs, the first passes left out."""
    num_runs, choice, num_devices = RUNS[name]
    outs = [f"{out}-{number}" for number in range(num_runs)]
    with served() if choice == "serve" else contextlib.nullcontext() as url:
        source = {"serve": ["--teacher-url", url], "cache": ["--targets", "targets"], "in-process": ["--teacher-ckpt", "teacher"]}[choice]
        group = ["--group", "plan"] if choice == "serve" else []
        cores = set(list(os.sched_getaffinity(0))[:num_devices])
        processes = [
            start("salt-train", "student", *source, *group, "--data", "shards", "--out", to, *flags(steps), cores=cores) for to in outs
        ]
        for process in processes:
            finish(process)
    rates = []
    for to in outs:
        lines = [json.loads(line) for line in (Path(to) / "metrics.jsonl").read_text().splitlines()]
        late = [line["step_ms"] for line in lines if line["step"] > WARM_UP_STEPS]
        rates.append(1000 * 24 / statistics.mean(late))
    return statistics.mean(rates)


@contextlib.contextmanager
def served():
    """URL of the teacher, by the real command."""
    process = start("salt-serve", "teacher", "--ckpt", "teacher", "--port", 0, "--cpus", 0.5)
    try:
        yield next(line.strip() for line in process.stdout if line.startswith("http"))
    finally:
        process.terminate()
        process.wait()


def flags(steps):
    return ["--preset", "nano", "--steps", steps, "--views", 1, "--workers", 0, "--set", "optim.warmup_steps=5"]


def salt(*command):
    finish(start(*command))


def start(command, *arguments, cores=None):
    program = [
        sys.executable,
        "-c",
        f"import sys; sys.argv[0] = {command!r}; from {MAINS[command]} import main; main()",
        *map(str, arguments),
    ]
    pin = None if cores is None else lambda: os.sched_setaffinity(0, cores)
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=pin)


def finish(process):
    said, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(said)


if __name__ == "__main__":
    main()
