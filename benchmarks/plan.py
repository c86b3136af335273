"""What `salt-plan` predicts over what real runs take: served to one and two students, cached, in process.
`python benchmarks/plan.py`; results are in docs/planning.md.

The machine is one core, of which everything takes turns (`--gpus 1`), and its clock is CPU time, user and
system, of all processes involved: by the wall's clock a machine that others use too would be measured
instead. Reading a clip takes its time from the same core, so it counts as part of the student's step.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

import salt_distill.student_trainer.estimate
from salt_distill.common.config import LoaderConfig, PlanConfig, StudentRun, preset_layer
from salt_distill.common.data.reader import Reader
from salt_distill.common.plan.facts import gather
from salt_distill.common.plan.show import plan

MAINS = {
    "salt-data": "salt_distill.common.data.making.cli",
    "salt-train": "salt_distill.student_trainer.cli",
    "salt-serve": "salt_distill.teacher_server.cli",
}
NUM_VIDEOS = 480
WARM_UP_STEPS = 30
"""The first pass decodes; later ones have the frames in memory."""
RUNS = {
    "served to 1 student": (1, "serve", 2),
    "served to 2 students": (2, "serve", 2),
    "cached": (1, "cache", 1),
    "in process": (1, "in-process", 1),
}
"""Student runs, what the planner calls the choice, and how many processes compute at a time on the two cores:
speeds are measured as many at a time, since one beside another is slower."""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=130, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        salt("salt-data", "synth", "videos", "--num-train", NUM_VIDEOS, "--num-test", 8)
        salt("salt-data", "pack", "videos", "shards")
        salt("salt-train", "teacher", "--data", "shards", "--out", "teacher", *flags(12))
        salt(
            "salt-serve",
            "precompute",
            "--ckpt",
            "teacher",
            "--data",
            "shards",
            "--views",
            1,
            "--out",
            "targets",
        )
        ratios = {name: [] for name in RUNS}
        for number in range(arguments.rounds):
            rates = {at_once: measure_together(at_once) for at_once in (1, 2)}
            print(json.dumps({"load": os.getloadavg()[0], "clips per core second": rates}), flush=True)
            for name, of_round in ratios.items():
                predicted, measured = (
                    predict(name, rates[RUNS[name][2]]),
                    run(name, arguments.steps, f"{number}-{name}"),
                )
                of_round.append(predicted / measured)
                print(
                    f"{name}: predicted {1000 * predicted:.2f} ms of a core per slot, measured"
                    f" {1000 * measured:.2f}",
                    flush=True,
                )
    print("predicted over measured, median of the rounds (least to most)")
    for name, of_round in ratios.items():
        print(f"{name}: {statistics.median(of_round):.2f} ({min(of_round):.2f} to {max(of_round):.2f})")


def measure_together(at_once):
    """The mean of what so many processes find at a time."""
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [future.result() for future in [pool.submit(measure) for _ in range(at_once)]]
    return {name: statistics.mean(rates[name] for rates in found) for name in found[0]}


def measure():
    """Clips per core second of teacher, student and reader: `--estimate` and a pass over the data, by CPU
    time."""
    preset = preset_layer(StudentRun, "nano")
    config = StudentRun.model_validate(
        {**preset, "data": "shards", "out": "none", "teacher_ckpt": "teacher", "workers": 0}
    )
    salt_distill.student_trainer.estimate.time = SimpleNamespace(perf_counter=time.process_time)
    measured = salt_distill.student_trainer.estimate.estimate(config, torch.device("cpu"))
    loader = LoaderConfig.model_validate(preset["loader"])
    with contextlib.closing(
        Reader("shards", data_seed=0, views=1, view=config.view, split="train", loader=loader)
    ) as reader:
        reader.clips(range(NUM_VIDEOS))
        started = time.process_time()
        reader.clips(range(NUM_VIDEOS, 3 * NUM_VIDEOS))
        reader_rate = 2 * NUM_VIDEOS / (time.process_time() - started)
    return {
        "teacher": measured.teacher.clips_per_s,
        "student": measured.student.clips_per_s,
        "reader": reader_rate,
    }


def predict(name, rates):
    """Core seconds of a slot of all runs together, by the planner."""
    runs, choice, _ = RUNS[name]
    config = PlanConfig.model_validate(
        {
            **{
                "teacher": "nano",
                "teacher_clips_per_s": rates["teacher"],
                "teacher_replicas": 1,
                "gpus": 1,
                "samples": NUM_VIDEOS,
                "views": 1,
            },
            "student": [
                {
                    "preset": "nano",
                    "runs": runs,
                    "clips_per_s": 1 / (1 / rates["student"] + 1 / rates["reader"]),
                }
            ],
            **{"link_gbps": 100, "decode_clips_per_s": 1e6, "disk_gb_per_s": 10},  # not what binds here
        }
    )
    found = next(found for found in plan(gather(config), replicas=1) if found.name == choice)
    return found.train_hours * 3600 / config.steps / config.batch_size


def run(name, steps, out):
    """Core seconds of a slot of the real runs together, the first steps left out."""
    num_runs, choice, _ = RUNS[name]
    outs = [f"{out}-{number}" for number in range(num_runs)]
    with contextlib.ExitStack() as stack:
        processes = []
        if choice == "serve":
            server = start("salt-serve", "teacher", "--ckpt", "teacher", "--port", 0, "--cpus", 0.5)
            stack.callback(lambda: (server.terminate(), server.wait()))
            url = next(line.strip() for line in server.stdout if line.startswith("http"))
            processes.append(server)
        source = {
            "serve": ["--group", "plan", "--teacher-url"],
            "cache": ["--targets"],
            "in-process": ["--teacher-ckpt"],
        }[choice]
        where = {"serve": lambda: url, "cache": lambda: "targets", "in-process": lambda: "teacher"}[choice]()
        students = [
            start("salt-train", "student", *source, where, "--data", "shards", "--out", to, *flags(steps))
            for to in outs
        ]
        processes += students
        before = when(outs, WARM_UP_STEPS, processes)
        after = when(outs, steps - 10, processes)
        for process in students:
            finish(process)
    slots = 24 * statistics.mean(last - first for first, last in zip(before[0], after[0], strict=True))
    return (after[1] - before[1]) / slots


def when(outs, step, processes):
    """Steps of the runs, and CPU seconds of all processes, when the slowest run has come to a step."""
    while True:
        files = [Path(out) / "metrics.jsonl" for out in outs]
        lines = [file.read_text().split("\n")[:-1] if file.exists() else [] for file in files]
        steps = [json.loads(of_run[-1])["step"] if of_run else 0 for of_run in lines]
        if min(steps) >= step:
            return steps, cpu_seconds({process.pid for process in processes})
        if any(process.poll() not in (None, 0) for process in processes):
            raise SystemExit(next(process.stdout.read() for process in processes if process.poll()))
        time.sleep(0.02)


def cpu_seconds(pids):
    """User and system time of processes and of all below them."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = path.read_text().rpartition(")")[2].split()
            stats[int(path.parent.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    found = set(pids)
    while more := {pid for pid, (parent, _) in stats.items() if parent in found} - found:
        found |= more
    return sum(stats[pid][1] for pid in found if pid in stats) / os.sysconf("SC_CLK_TCK")


def flags(steps):
    return [
        "--preset",
        "nano",
        "--steps",
        steps,
        "--views",
        1,
        "--workers",
        0,
        "--set",
        "optim.warmup_steps=5",
    ]


def salt(*command):
    finish(start(*command))


def start(command, *arguments):
    program = [
        sys.executable,
        "-c",
        f"import sys; sys.argv[0] = {command!r}; from {MAINS[command]} import main; main()",
        *map(str, arguments),
    ]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    said, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(said)


if __name__ == "__main__":
    main()
