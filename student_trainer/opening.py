"""What a run reads, opened: its clips and each teacher's targets. The line that says how it trains."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from salt_distill.common.config import StudentRun, TrainConfig, name_of_size
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.compute import precision, prepare
from salt_distill.common.model.roofline import gpu_name
from salt_distill.common.model.teacher import device_kind
from salt_distill.student_trainer.estimate_table import duration
from salt_distill.student_trainer.gpu_estimate import expected_run_s
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.targets.client import require_same_teacher
from salt_distill.student_trainer.targets.source import TargetSource, open_sources, source_order, views_of


@contextlib.contextmanager
def opened(config: TrainConfig, worker: Worker) -> Iterator[tuple[Reader, list[TargetSource]]]:
    """Where this rank's clips and each teacher's targets come from; every rank asks for it."""
    prepare(worker.device)
    with ThreadPoolExecutor(1) as opening, contextlib.ExitStack() as stack:
        (reader, sources), _ = worker.ranks.result(opening.submit(_open, config, worker, stack))
        each = "s, each" if worker.world_size > 1 else ""
        worker.say(
            f"{name_of_size(config.encoder)}: {config.steps:,} steps of {config.batch_size:,} clips on"
            f" {worker.world_size} worker{each} on {device_kind(worker.device)},"
            f" {precision(config.compute.dtype, worker.device)};"
            f" {expected_time(config, worker.device, sources) if worker.rank == 0 else ''}"
        )
        worker.say(f"{config.data}: {reader.num_samples} samples, decoded by {reader.decoder}")
        for number, source in enumerate(sources):
            assert isinstance(config, StudentRun), "only a student has teachers"
            share = f", {config.loss_shares[number]:.0%} of the loss" if len(sources) > 1 else ""
            place = source_order(config, number)
            worker.say(f"targets of teacher {source.spec.fingerprint[:12]} from {place}{share}")
            specs = worker.ranks.all_values(source.spec)  # a service may have replicas on other devices
            for spec in specs:
                require_same_teacher(spec, specs[0])
        yield reader, sources


def _open(
    config: TrainConfig, worker: Worker, stack: contextlib.ExitStack
) -> tuple[Reader, list[TargetSource]]:
    """Where this rank's clips and targets come from; ``stack`` closes them."""
    reader = Reader(
        config.data,
        data_seed=config.data_seed,
        views=views_of(config),
        view=config.view,
        split=config.split,
        loader=config.loader,
        num_held_out=0 if config.val_every is None else config.val_clips,
    )
    stack.callback(reader.close)
    if not isinstance(config, StudentRun):
        return reader, []
    sources = []
    for source in open_sources(config, run=Path(config.out).name, rank=worker.rank, device=worker.device):
        stack.callback(source.close)
        sources.append(source)
    return reader, sources


def expected_time(config: TrainConfig, device: torch.device, sources: Sequence[TargetSource]) -> str:
    """Of the whole run, where the estimate knows the device and can count what runs on it."""
    gpu = gpu_name(device)
    elsewhere = [source.spec.width for source in sources if source.name != "in-process"]
    expected = None if gpu is None else expected_run_s(config, gpu, elsewhere)
    if expected is None:
        return "the time that it takes is shown after the first steps"
    low, high = map(duration, expected)
    return f"{low} to {high} by the estimate for {gpu}, without reading clips"
