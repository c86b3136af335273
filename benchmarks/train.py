"""What a training step costs, as ratios of one run. `python benchmarks/train.py --help`; results are in
benchmarks/README.md.

Clips are random bytes, so nothing is decoded but in `parts --data`; it runs where there is no Ray, no PyAV
and no pydantic extra, also on a GPU.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from in_memory import ClipsInMemory, TargetsInMemory
from serving import make_clips
from torch import nn

from salt_distill.common.config import MASK_GROUP_SIZE, EncoderConfig, StudentRun, merge, preset_layer
from salt_distill.common.data.views import view_facts
from salt_distill.common.model.compute import matrix_peak, set_up, uses_bfloat16, wait_for
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.teacher import Teacher, device_kind
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.common.targets import codec
from salt_distill.common.targets.cache_file import CacheRow, file_path, write_file
from salt_distill.common.targets.manifest import CacheSpec, FileListing, Manifest
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.loop import Worker, train_on, update
from salt_distill.student_trainer.objective import new_objective
from salt_distill.student_trainer.optim import new_optimizer, set_schedule
from salt_distill.student_trainer.run_directory import read_metrics
from salt_distill.student_trainer.targets.stored_targets import StoredTargets
from salt_distill.student_trainer.utilisation import Utilisation


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["parts", "cached", "flat"])
    parser.add_argument("--preset", default="tiny", help="size of the student")
    parser.add_argument(
        "--teacher", help="size of the teacher, a preset; that of the student unless it is given"
    )
    parser.add_argument(
        "--crop-size", type=int, default=112, help="clips are 16 frames of this size, in pixels"
    )
    parser.add_argument("--batch-size", type=int, default=24, help="clips per step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=None, help="of one run: 20 of `cached`, 10000 of `flat`")
    parser.add_argument("--clips", type=int, default=240, help="clips of `cached` and `flat`, all in memory")
    parser.add_argument("--data", help="of `parts`: shards, to time reading and decoding too")
    parser.add_argument("--compile", action="store_true", help="torch.compile, of student and teacher")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "explicit"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"parts": parts, "cached": cached, "flat": flat}[arguments.what](arguments)


def parts(arguments):
    """A stage-2 step against its parts, each timed by itself, in turns; what each takes of it; MFU and peak
    memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = run_config(arguments, steps=1000)
    teacher = new_teacher(arguments, config, device)
    objective, checkpoint_config = new_objective(config, [teacher.spec])
    ways = StepParts(config, objective.to(device), teacher, device).ways()
    if arguments.data is not None:
        ways["data"] = reading(arguments.data, config)
    clock = (
        time.perf_counter if device.type == "cuda" else time.process_time
    )  # of a processor: whatever else runs here
    seconds = {name: [] for name in ways}
    for number in range(arguments.rounds + 2):
        for name, way in ways.items():
            wait_for(device)
            begun = clock()
            way()
            wait_for(device)
            if number >= 2:
                seconds[name].append(clock() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    sums = [
        sum(values)
        for values in zip(*(seconds[name] for name in ("encoder", "predictor", "optimizer")), strict=True)
    ]
    usage = Utilisation.of(
        config,
        out_width=sum(checkpoint_config.predictor_out_width),
        target_flops=0.0,
        peak_flops_per_s=matrix_peak(device, config.compute.dtype),
    )
    say(
        preset=arguments.preset,
        teacher=arguments.teacher or arguments.preset,
        device=device_kind(device),
        clip=list(config.view.clip_shape),
        batch_size=config.batch_size,
        compute=config.compute.model_dump(),
        milliseconds={name: round(1000 * value, 2) for name, value in medians.items()},
        step_over_sum_of_parts=round(
            statistics.median(whole / of for whole, of in zip(seconds["step"], sums, strict=True)), 3
        ),
        share_with_teacher={
            name: round(medians[name] / (medians["step"] + medians["teacher"]), 3)
            for name in ("encoder", "predictor", "optimizer", "teacher")
        },
        clips_per_s=round(config.batch_size / medians["step"], 2),
        mfu=round(usage.mfu(config.batch_size / medians["step"]), 3),
        peak_tflops=round(usage.peak_flops_per_s / 1e12, 3),
        peak_memory_gb=peak_memory_gb(ways["step"], device),
    )


class StepParts:
    """A stage-2 step on random clips, and what it is made of."""

    def __init__(self, config, objective, teacher, device):
        self.config, self.objective, self.teacher, self.device = config, objective, teacher, device
        set_up(objective, config.compute, device)
        self.optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
        set_schedule(self.optimizer, config.optim, step=500, steps=config.steps)
        self.clips = make_clips(config.batch_size, config.view.clip_shape, seed=0)
        self.grid = token_grid(config.view, config.encoder)
        groups = range(-(-config.batch_size // MASK_GROUP_SIZE))
        masks = [
            mask_group(config.mask, self.grid, seed=0, step=1, group=group, batch_size=config.batch_size)
            for group in groups
        ]
        self.batch = Batch(step=1, clips=self.clips, masks=masks)
        target = torch.randn(config.batch_size, self.grid.num_tokens, teacher.spec.width)
        self.target = codec.pack(target, "float16")
        self.worker = Worker(rank=0, world_size=1, device=device)

    def ways(self):
        return {
            "step": self.step,
            "encoder": self.encoder,
            "predictor": self.predictor,
            "optimizer": self.optimise,
            "teacher": self.targets,
        }

    def step(self):
        update(self.objective, self.optimizer, self.batch, [self.target], self.config, self.worker)

    def encoder(self):
        for group in self.batch.groups([self.target], self.device):
            with self.autocast():
                visible = [
                    self.objective.encoder.visible(group.pixels, mask.visible_idx)
                    for mask in group.masks.sets
                ]
            torch.autograd.backward(visible, [torch.ones_like(tokens) for tokens in visible])

    def predictor(self):
        for group in self.batch.groups([self.target], self.device):
            made = []
            for set_idx, mask in enumerate(group.masks.sets):
                visible = torch.zeros(
                    *mask.visible_idx.shape, self.config.encoder.width, device=self.device, requires_grad=True
                )
                with self.autocast():
                    made.append(
                        self.objective.predictor(
                            visible, mask.visible_idx, mask.hidden_idx, grid=self.grid, mask_set=set_idx
                        )
                    )
            torch.autograd.backward(made, [torch.ones_like(tokens) for tokens in made])

    def optimise(self):
        nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()

    def targets(self):
        size = self.teacher.spec.compute["batch_size"]
        for first in range(0, self.config.batch_size, size):
            codec.encode(self.teacher.forward(self.clips.pixels[first : first + size]), "float16")

    def autocast(self):
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=uses_bfloat16(self.config.compute.dtype, self.device),
        )


def peak_memory_gb(step, device):
    """Most that tensors hold in a step; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    wait_for(device)
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)


def cached(arguments):
    """A step with targets from a cache on disk over the same step with targets that are in memory already;
    runs in turns, medians of ratios."""
    config = run_config(arguments, steps=arguments.steps or 20)
    with tempfile.TemporaryDirectory() as folder:
        reader, in_memory, root = clips_and_targets(arguments, config, Path(folder))
        ratios, processor_ratios, milliseconds = [], [], {"in memory": [], "cached": []}
        for number in range(arguments.rounds + 1):
            of_round, processor = {}, {}
            for name in ("in memory", "cached") if number % 2 else ("cached", "in memory"):
                source = in_memory if name == "in memory" else open_cache(root, config)
                begun = time.process_time()
                of_round[name] = median_step_ms(config, reader, source, Path(folder) / f"{name}-{number}")
                processor[name] = time.process_time() - begun
            if number:
                ratios.append(of_round["cached"] / of_round["in memory"])
                processor_ratios.append(processor["cached"] / processor["in memory"])
                for name, value in of_round.items():
                    milliseconds[name].append(value)
        say(
            milliseconds={name: round(statistics.median(values), 2) for name, values in milliseconds.items()},
            cached_over_in_memory=round(statistics.median(ratios), 3),
            ratios=[round(ratio, 3) for ratio in sorted(ratios)],
            processor_time_of_runs=round(statistics.median(processor_ratios), 3),
            bytes_of_a_step=config.batch_size * in_memory.spec.num_tokens * in_memory.spec.width * 2,
        )


def flat(arguments):
    """Step time and memory of a long run with cached targets, a line for every tenth of it."""
    if arguments.steps is not None and arguments.steps < 200:
        raise ValueError(
            f"got --steps {arguments.steps}, expected at least 200: a line says something of twenty steps or"
            " more"
        )
    arguments.preset, arguments.crop_size = "nano", 32
    config = run_config(arguments, steps=arguments.steps or 10_000)
    config = config.model_copy(update={"log_every": 10, "keep_every": config.steps})
    with tempfile.TemporaryDirectory() as folder:
        reader, _, root = clips_and_targets(arguments, config, Path(folder))
        out, seen = Path(folder) / "run", []
        source = open_cache(root, config)
        source.report = lambda line: seen.append(
            (time.process_time(), resident_bytes())
        )  # called with each line of metrics
        train(config, reader, source, out)
        lines = read_metrics(out)
        tenth = len(lines) // 10
        for first in range(0, 10 * tenth, tenth):
            of_tenth, (cpu_before, _), (cpu_after, resident) = (
                lines[first : first + tenth],
                seen[first],
                seen[first + tenth - 1],
            )
            say(
                steps=of_tenth[-1]["step"],
                step_ms=round(statistics.median(line["step_ms"] for line in of_tenth), 2),
                cpu_ms=round(
                    1000 * (cpu_after - cpu_before) / (of_tenth[-1]["step"] - of_tenth[0]["step"]), 2
                ),  # whatever else runs here
                resident_mb=round(resident / 1e6, 1),
            )
        say(peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1))


# --- what they share ---


def run_config(arguments, *, steps):
    preset = preset_layer(StudentRun, arguments.preset)
    nano = arguments.preset == "nano"
    values = {
        **{
            "data": "random",
            "out": "none",
            "steps": steps,
            "batch_size": arguments.batch_size,
            "targets": "none",
            "log_every": 1,
        },
        "view": {} if nano else {"num_frames": 16, "crop_size": arguments.crop_size},
        "optim": {"warmup_steps": min(10, steps - 1)},
        "compute": {
            "compile": arguments.compile,
            "activation_checkpointing": arguments.activation_checkpointing,
            "attention": arguments.attention,
        },
        "teacher": {"compile": arguments.compile},
    }
    return StudentRun.model_validate(merge(preset, values))


def new_teacher(arguments, config, device):
    """Random weights: they cost what others do."""
    architecture = EncoderConfig.model_validate(
        preset_layer(StudentRun, arguments.teacher or arguments.preset)["encoder"]
    )
    encoder = Encoder(architecture)
    init_weights(encoder, torch.Generator().manual_seed(0), std=config.init_std)
    frozen = FrozenEncoder(name="benchmark", config=architecture, view=config.view, load=lambda: encoder)
    return Teacher(frozen, config.teacher, device)


def reading(data, config):
    from salt_distill.common.data.reader import Reader  # it needs PyAV

    reader = Reader(data, data_seed=0, views="fresh", view=config.view, split="all", loader=config.loader)
    slots = iter(range(0, 1_000_000, config.batch_size))

    def read():
        first = next(slots)
        reader.clips(range(first, first + config.batch_size))

    return read


def clips_and_targets(arguments, config, folder):
    """Clips, the source that has their targets in memory, and a cache of the same targets."""
    if arguments.clips % config.batch_size:
        raise ValueError(
            f"got --clips {arguments.clips}, expected a multiple of the batch size, {config.batch_size}"
        )
    teacher = new_teacher(arguments, config, torch.device("cpu")).spec
    clips = make_clips(arguments.clips, config.view.clip_shape, seed=0)
    shape = (teacher.num_tokens, teacher.width)
    spec = CacheSpec(
        teacher=teacher,
        target_dtype="float16",
        shape=shape,
        data_seed=0,
        views=1,
        view=view_facts(config.view),
        decoder="none",
        index_hash="none",
        split="train",
    )
    generator = torch.Generator().manual_seed(0)

    def rows():
        for digest, key in zip(clips.digests, clips.keys, strict=True):
            [encoded] = codec.encode(torch.randn(1, *shape, generator=generator), "float16")
            yield CacheRow(clip_digest=digest, key=key, view=0, encoded=encoded)

    root = folder / "targets"
    name = file_path(spec, 0, "random-000000.tar")
    num_rows = write_file(root / name, spec, rows())
    Manifest(spec=spec, files={name: FileListing.of(root / name, num_rows)}).write(root)
    return ClipsInMemory(clips), open_cache(root, config, TargetsInMemory).hold(clips), root


def open_cache(root, config, kind=StoredTargets):
    return kind(root, "float16", data_seed=0, view=config.view, decoder="none")


def train(config, reader, source, out):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir()
    train_on(
        reader,
        [source],
        config.model_copy(update={"out": str(out)}),
        Worker(rank=0, world_size=1, device=device),
        None,
    )


def median_step_ms(config, reader, source, out):
    train(config, reader, source, out)
    return statistics.median(line["step_ms"] for line in read_metrics(out)[2:])


def resident_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no VmRSS in /proc/self/status")


def say(**values):
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
