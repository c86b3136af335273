"""The training loop, top to bottom, for every objective and every source of targets; plain PyTorch."""

import contextlib
import functools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from salt_distill.common.config import StudentRun, TrainConfig, name_of_size
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import CheckpointConfig
from salt_distill.common.model.compute import precision, prepare, set_up, uses_bfloat16
from salt_distill.common.model.teacher import TeacherSpec, device_kind
from salt_distill.common.termination import uninterrupted
from salt_distill.student_trainer.batches import Batch, Batches
from salt_distill.student_trainer.init import initialised
from salt_distill.student_trainer.metrics import Update
from salt_distill.student_trainer.objective import Objective, new_objective
from salt_distill.student_trainer.optim import new_optimizer, set_schedule
from salt_distill.student_trainer.parallel import (
    clip_gradients,
    gradients,
    num_passes,
    restore,
    spread,
)
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.record import RunRecord
from salt_distill.student_trainer.resume import ClipOrder
from salt_distill.student_trainer.targets.client import require_same_teacher
from salt_distill.student_trainer.targets.source import TargetSource, open_source, source_order, views_of
from salt_distill.student_trainer.validation import Validation
from salt_distill.student_trainer.vjepa import VJepa


def train_on(
    reader: Reader, source: TargetSource | None, config: TrainConfig, worker: Worker, checkpoint: Path | None
) -> None:
    """Runs ``config`` from rank 0's ``checkpoint`` (None: from the start) to its last step, with clips from
    ``reader`` and, in stage 2, targets from ``source``; every rank calls it. Where it is interrupted, what it
    has learned until then has a checkpoint."""
    torch.set_num_threads(config.num_threads)
    objective, model, optimizer, checkpoint_config = assembled(config, source, worker, checkpoint)
    start = restore(checkpoint, objective, optimizer, worker)
    if start is not None:
        torch.set_rng_state(start.rng)
        start.require_clips(ClipOrder.of(config, reader), config.data)
        reader.count_on(num_clips=start.slot, num_bad=start.bad_clips)
        if source is not None and start.teacher is not None:
            source.require(TeacherSpec.from_json(json.loads(start.teacher)))
        worker.say(f"resuming {config.out} after step {start.step}")
    validation = Validation(config, worker, objective, reader, source, start=start)
    record = RunRecord(
        config,
        worker,
        objective,
        optimizer,
        checkpoint_config,
        reader,
        source,
        validation,
        start=start,
        checkpoint=checkpoint,
    )
    batches = Batches.of(config, reader, source, worker)

    done = 0 if start is None else start.step
    steps = batches.steps(done + 1, done if validation.ends_run else config.steps)
    try:
        for future in steps:
            batch, data_wait_s = worker.ranks.result(future, record.is_to_stop)
            target, teacher_wait_s = (
                (None, 0.0) if batch.target is None else worker.ranks.result(batch.target, record.is_to_stop)
            )
            lr, weight_decay = set_schedule(optimizer, config.optim, step=batch.step, steps=config.steps)
            updated = backward(model, optimizer, batch, target, config, worker)
            with uninterrupted():  # a step is done and taken in, or neither
                optimizer.step()
                if isinstance(objective, VJepa):
                    objective.move_target_encoder(step=batch.step, steps=config.steps)
                record.add(
                    batch,
                    updated,
                    data_wait_s=data_wait_s,
                    teacher_wait_s=teacher_wait_s,
                    lr=lr,
                    weight_decay=weight_decay,
                    measured=validation.after(batch.step),
                )
            if validation.ends_run:
                break
    except KeyboardInterrupt:
        record.stop()
        raise
    record.close()


def assembled(
    config: TrainConfig, source: TargetSource | None, worker: Worker, checkpoint: Path | None
) -> tuple[Objective, torch.nn.Module, torch.optim.Optimizer, CheckpointConfig]:
    """What a run trains: its objective, the module that a step calls, the optimizer, and the configuration of
    its checkpoints. ``checkpoint``: where it goes on; None: it begins."""
    objective, checkpoint_config = new_objective(config, None if source is None else source.spec)
    checkpoint_config = initialised(checkpoint_config, objective, config, worker, checkpoint)
    set_up(objective, config.compute, worker.device)
    model = spread(objective, config.compute.sharding, worker)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    return objective, model, optimizer, checkpoint_config


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    target: Tensor | None,
    config: TrainConfig,
    worker: Worker,
) -> Update:
    """One optimizer step, left out where loss or gradient is not finite. Nothing here waits for the
    device."""
    updated = backward(model, optimizer, batch, target, config, worker)
    optimizer.step()
    return updated


def backward(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    target: Tensor | None,
    config: TrainConfig,
    worker: Worker,
) -> Update:
    """The gradient of a step, for the optimizer to step by; it leaves the step out where loss or gradient is
    not finite.

    Each mask group is a forward and a backward of its own, so a batch of any size fits where a group fits.
    """
    bfloat16 = uses_bfloat16(config.compute.dtype, worker.device)
    autocast = functools.partial(torch.autocast, worker.device.type, dtype=torch.bfloat16)
    # The loss is a mean over the good clips of the global batch, so a rank weighs its own by everybody's
    # count.
    num_good = worker.sum(torch.full((), int(batch.clips.good.sum()), device=worker.device)).clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    loss, clip_losses = torch.zeros((), device=worker.device), []
    groups = batch.groups(target, worker.device, num_passes(model, batch, config.batch_size, worker))
    # One context a step: autocast keeps the weights that it has cast until it ends, for all mask groups.
    with autocast(enabled=bfloat16):
        for group in groups:
            with gradients(model, exchange=group.last):
                losses = model(*group.inputs)
                weighted = losses.mean(0) * group.good
                share = weighted.sum() / num_good
                with autocast(enabled=False):
                    (share * worker.world_size).backward()  # what is exchanged is the mean over the ranks
            loss += share.detach()
            clip_losses.append(weighted.detach())
    loss = worker.sum(loss.double())
    norm = clip_gradients(model, config.optim, batch.step)
    # Both: an infinite L1 loss has a finite gradient.
    optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells a fused optimizer
    return Update(loss=loss, norm=norm, clip_losses=torch.cat(clip_losses)[: len(batch.clips.good)])


@contextlib.contextmanager
def opened(config: TrainConfig, worker: Worker) -> Iterator[tuple[Reader, TargetSource | None]]:
    """Where this rank's clips and targets come from; every rank asks for it."""
    prepare(worker.device)
    with ThreadPoolExecutor(1) as opening, contextlib.ExitStack() as stack:
        (reader, source), _ = worker.ranks.result(opening.submit(_open, config, worker, stack))
        worker.say(
            f"{name_of_size(config.encoder)}: {config.steps:,} steps of {config.batch_size:,} clips on"
            f" {worker.world_size} worker(s), each on {device_kind(worker.device)},"
            f" {precision(config.compute.dtype, worker.device)}"
        )
        worker.say(f"{config.data}: {reader.num_samples} samples, decoded by {reader.decoder}")
        if source is not None and isinstance(config, StudentRun):
            worker.say(f"targets of teacher {source.spec.fingerprint[:12]} from {source_order(config)}")
            specs = worker.ranks.all_values(source.spec)  # a service may have replicas on other devices
            for spec in specs:
                require_same_teacher(spec, specs[0])
        yield reader, source


def _open(
    config: TrainConfig, worker: Worker, stack: contextlib.ExitStack
) -> tuple[Reader, TargetSource | None]:
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
        return reader, None
    source = open_source(config, run=Path(config.out).name, rank=worker.rank, device=worker.device)
    stack.callback(source.close)
    return reader, source
