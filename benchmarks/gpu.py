"""Measurements of `gpu.sh`: steps of every objective, eager and compiled, beside the roofline's prediction;
no wait of the host in a step; the teacher served; FSDP2 of the largest size on one rank. Writes one JSON, and
prints a table for README.md."""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
import uvicorn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from salt_distill.common.config import (
    ServiceClientConfig,
    ServiceConfig,
    StudentRun,
    TeacherRun,
    VJepaRun,
    merge,
    preset_layer,
)
from salt_distill.common.model.checkpoint import save_checkpoint
from salt_distill.common.model.compute import matrix_peak, prepare, set_up, wait_for
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.teacher import Teacher, device_kind
from salt_distill.common.model.vit import Block
from salt_distill.common.targets import codec
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.estimate import random_clips
from salt_distill.student_trainer.gpu_estimate import estimate_on
from salt_distill.student_trainer.loop import update
from salt_distill.student_trainer.objective import modules_of, new_objective
from salt_distill.student_trainer.optim import new_optimizer, set_schedule
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.student_trainer.utilisation import Utilisation
from salt_distill.student_trainer.vjepa import VJepa
from salt_distill.teacher_server.http.service import build_app

RUNS = {"V-Pixel": TeacherRun, "SALT, cached": StudentRun, "SALT, in process": StudentRun, "V-JEPA": VJepaRun}
NUM_WARM_UP, NUM_TIMED = 3, 8
"""Steps of a row. Small, to see that the script works: three in all."""
MAX_PART_S = 40.0
"""Longest that the steps of one row may take: a row of fewer than all steps says how many."""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tests", default="not run", help="how the tests ended")
    parser.add_argument("--nano", action="store_true", help="small, and on the CPU where there is no GPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not arguments.nano:
        raise SystemExit("there is no CUDA device: give --nano to see whether this script works")
    prepare(device)
    torch.set_num_threads(1)
    gpu = next(
        (name for name in ("h200", "h100", "a100", "b200", "4090", "l4") if name in kind_of(device)), "h200"
    )
    found = {
        "device": device_kind(device),
        "torch": torch.__version__,
        "tests": arguments.tests,
        "predicted_for": gpu,
    }
    found["peak_tflops"] = matrix_peak(device, "auto") / 1e12
    found["rows"] = []
    sizes = ["nano"] if arguments.nano else ["vit-b", "vit-l", "vit-g"]
    with tempfile.TemporaryDirectory() as folder:
        teacher = save_teacher("nano" if arguments.nano else "vit-l", Path(folder) / "teacher")
        for preset in sizes:
            for objective in RUNS:
                for compiled in (False, True):
                    num_timed = 0 if arguments.nano else NUM_TIMED
                    row = steps(preset, objective, compiled, teacher, device, gpu, num_timed)
                    found["rows"].append(row)
                    print(json.dumps(row), flush=True)
                    Path(arguments.out).write_text(json.dumps(found, indent=2) + "\n")
        found["served_over_in_process"] = served("nano" if arguments.nano else "vit-l", teacher, device)
    found["fsdp"] = sharded("nano" if arguments.nano else "vit-G", device)
    Path(arguments.out).write_text(json.dumps(found, indent=2) + "\n")
    table(found)


def kind_of(device):
    return device_kind(device).lower().replace(" ", "")


def save_teacher(preset, directory):
    config = TeacherRun.model_validate(preset_layer(TeacherRun, preset) | {"data": "none", "out": "none"})
    objective, checkpoint_config = new_objective(config)
    state = {file: module.state_dict() for file, module in modules_of(objective).items()}
    save_checkpoint(directory, checkpoint_config, state, {})
    return directory


def run_config(objective, preset, compiled, **compute):
    config_class = RUNS[objective]
    values = {"data": "none", "out": "none", "steps": 1000, "batch_size": 24, "optim": {"warmup_steps": 10}}
    values["compute"] = {"compile": compiled, **compute}
    if config_class is StudentRun:
        values |= {"targets": "none", "teacher": {"compile": compiled}}
    return config_class.model_validate(merge(preset_layer(config_class, preset), values))


def steps(preset, name, compiled, ckpt, device, gpu, num_timed):
    """Time and memory of a step, and what the roofline says of it."""
    row = {"preset": preset, "run": name, "compiled": compiled}
    try:
        return row | timed(run_config(name, preset, compiled), name, ckpt, device, gpu, num_timed)
    except (ValueError, torch.OutOfMemoryError) as error:  # a size too large for this GPU, no compilers
        return row | {"failed": str(error).splitlines()[0]}


def timed(config, name, ckpt, device, gpu, num_timed):
    worker, clips = (
        Worker(rank=0, world_size=1, device=device),
        random_clips(config, 24),
    )
    grid = token_grid(config.view, config.encoder)
    source, targets, specs = _targets_of(config, name, ckpt, device)
    objective, checkpoint_config = new_objective(config, specs)
    objective.to(device)
    set_up(objective, config.compute, device)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    seconds, began = [], time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(1, 1 + NUM_WARM_UP + num_timed):
        masks = [mask_group(config.mask, grid, seed=0, step=number, group=0, batch_size=24)]
        set_schedule(optimizer, config.optim, step=number, steps=config.steps)
        wait_for(device)
        begun = time.perf_counter()
        if source is not None:
            targets = [source.request(clips).result()]
        batch = Batch(step=number, clips=clips, masks=masks)
        if device.type == "cuda" and number == NUM_WARM_UP and source is None:
            torch.cuda.set_sync_debug_mode("error")  # a wait of the host raises
        try:
            update(objective, optimizer, batch, targets, config, worker)
            if isinstance(objective, VJepa):
                objective.move_target_encoder(step=number, steps=config.steps)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
        if time.perf_counter() - began > MAX_PART_S and number > NUM_WARM_UP:
            break
    if source is not None:
        source.close()
    step_s = statistics.median(seconds[NUM_WARM_UP:] or seconds[-1:])
    usage = Utilisation.of(
        config,
        out_width=sum(checkpoint_config.predictor_out_width),
        target_flops=0.0 if source is None else source.clip_flops,
        peak_flops_per_s=matrix_peak(device, config.compute.dtype),
    )
    predicted = estimate_on(_with_teacher(config, ckpt if name == "SALT, in process" else None), gpu)
    return {
        "step_ms": 1000 * step_s,
        "clips_per_s": 24 / step_s,
        "mfu": usage.mfu(24 / step_s),
        "steps": len(seconds) - NUM_WARM_UP,
        "first_step_s": seconds[0],
        "predicted_ms": [1000 * value for value in predicted.step_s],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "predicted_peak_gb": (predicted.memory_bytes - 1e9) / 1.05e9,
    }


def _targets_of(config, name, ckpt, device):
    """A teacher in process and nothing, or nothing and the targets of 24 clips; and the teachers."""
    if not isinstance(config, StudentRun):
        return None, [], []
    source = LocalTargets(Teacher.load(ckpt, config.teacher, device), config.target_dtype)
    if name == "SALT, in process":
        return source, [], [source.spec]
    source.close()
    num_tokens, width = token_grid(config.view, config.encoder).num_tokens, source.spec.width
    return None, [codec.empty_packed(24, num_tokens, width, config.target_dtype).zero_()], [source.spec]


def _with_teacher(config, ckpt):
    """A student's configuration with its teacher in process, or without any; another's as it is."""
    if not isinstance(config, StudentRun):
        return config
    return config.model_copy(
        update={"targets": ()} | ({} if ckpt is None else {"teacher_ckpt": (str(ckpt),)})
    )


def served(preset, ckpt, device):
    """Clips per second of a teacher under uvicorn over those of the same teacher in process, in turns; every
    clip is new."""
    config = run_config("SALT, cached", preset, False)
    teacher = Teacher.load(ckpt, config.teacher, device)
    app = build_app(teacher, ServiceConfig())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not (server.started and app.state.service.ready):
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    sources = ServiceTargets(url, "float16", ServiceClientConfig(), "gpu"), LocalTargets(teacher, "float16")
    seconds = {source: [] for source in sources}
    for number in range(5):
        for source in sources:
            clips = random_clips(config.model_copy(update={"seed": hash((source.name, number)) % 10**6}), 48)
            begun = time.perf_counter()
            source.request(clips).result()
            wait_for(device)
            seconds[source].append(time.perf_counter() - begun)
    for source in sources:
        source.close()
    server.should_exit = True
    thread.join()
    over_http, in_process = (statistics.median(seconds[source][1:]) for source in sources)
    return in_process / over_http


def sharded(preset, device):
    """FSDP2 of a preset on one rank: that it runs, and its memory."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    config = run_config("V-Pixel", preset, False, sharding="fsdp", activation_checkpointing=True)
    objective, _ = new_objective(config)
    worker = Worker(rank=0, world_size=1, device=device)
    set_up(objective, config.compute, device)
    objective.to(device)
    mesh = init_device_mesh(device.type, (1,))  # as `spread` shards it over more
    for block in [module for module in objective.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    grid, clips = token_grid(config.view, config.encoder), random_clips(config, 24)
    losses = []
    for number in (1, 2, 3):
        masks = [mask_group(config.mask, grid, seed=0, step=number, group=0, batch_size=24)]
        set_schedule(optimizer, config.optim, step=number, steps=config.steps)
        begun = time.perf_counter()
        done = update(
            objective,
            optimizer,
            Batch(step=number, clips=clips, masks=masks),
            (),
            config,
            worker,
        )
        losses.append(float(done.loss))
    torch.distributed.destroy_process_group()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {"preset": preset, "losses": losses, "step_s": time.perf_counter() - begun, "peak_gb": peak}


def table(found):
    print(f"{found['device']}, torch {found['torch']}; tests: {found['tests']}")
    print(f"served over in process: {found['served_over_in_process']:.2f}; FSDP2: {found['fsdp']}")
    print("| size | run | compiled | step, ms | predicted, ms | MFU | peak, GB | predicted, GB |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for row in found["rows"]:
        compiled = "yes" if row["compiled"] else "no"
        if "failed" in row:
            print(f"| {row['preset']} | {row['run']} | {compiled} | {row['failed']} | | | | |")
            continue
        low, high = row["predicted_ms"]
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
        print(
            f"| {row['preset']} | {row['run']} | {compiled} | {row['step_ms']:.1f} |"
            f" {low:.1f} to {high:.1f} |"
            f" {row['mfu']:.2f} | {peak} | {row['predicted_peak_gb']:.2f} |"
        )


if __name__ == "__main__":
    main()
