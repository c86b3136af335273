"""The training loop, top to bottom, for every objective and every source of targets; plain PyTorch."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from salt_distill.common.config import StudentRun, TrainConfig, name_of_size
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import CheckpointConfig
from salt_distill.common.model.compute import precision, prepare, set_up, uses_bfloat16
from salt_distill.common.model.teacher import device_kind
from salt_distill.common.termination import uninterrupted
from salt_distill.student_trainer.batches import Batch, Batches
from salt_distill.student_trainer.init import initialised
from salt_distill.student_trainer.metrics import Update
from salt_distill.student_trainer.objective import Objective, new_objective, of_teachers, weighted_mean
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
from salt_distill.student_trainer.targets.source import (
    TargetSource,
    open_sources,
    require_teachers,
    source_order,
    views_of,
)
from salt_distill.student_trainer.validation import Validation
from salt_distill.student_trainer.vjepa import VJepa


def train_on(
    reader: Reader,
    sources: Sequence[TargetSource],
    config: TrainConfig,
    worker: Worker,
    checkpoint: Path | None,
) -> None:
    """Runs ``config`` from rank 0's ``checkpoint`` (None: from the start) to its last step, with clips from
    ``reader`` and, in stage 2, each teacher's targets from its source; every rank calls it. Where it is
    interrupted, what it has learned until then has a checkpoint."""
    torch.set_num_threads(config.num_threads)
    objective, model, optimizer, checkpoint_config = assembled(config, sources, worker, checkpoint)
    start = restore(checkpoint, objective, optimizer, worker)
    if start is not None:
        torch.set_rng_state(start.rng)
        start.require_clips(ClipOrder.of(config, reader), config.data)
        reader.count_on(num_clips=start.slot, num_bad=start.bad_clips)
        require_teachers(sources, start.teacher)
        worker.say(f"resuming {config.out} after step {start.step}")
    validation = Validation(config, worker, objective, reader, sources, start=start)
    record = RunRecord(
        config,
        worker,
        objective,
        optimizer,
        checkpoint_config,
        reader,
        sources,
        validation,
        start=start,
        checkpoint=checkpoint,
    )
    batches = Batches.of(config, reader, sources, worker)

    done = 0 if start is None else start.step
    try:
        for future in batches.steps(done + 1, done if validation.ends_run else config.steps):
            batch, data_wait_s = worker.ranks.result(future, record.is_to_stop)
            targets, teacher_wait_s = worker.ranks.results(batch.targets, record.is_to_stop)
            lr, weight_decay = set_schedule(optimizer, config.optim, step=batch.step, steps=config.steps)
            updated = backward(model, optimizer, batch, targets, config, worker)
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
    config: TrainConfig, sources: Sequence[TargetSource], worker: Worker, checkpoint: Path | None
) -> tuple[Objective, torch.nn.Module, torch.optim.Optimizer, CheckpointConfig]:
    """What a run trains: its objective, the module that a step calls, the optimizer, and the configuration of
    its checkpoints. ``checkpoint``: where it goes on; None: it begins."""
    objective, checkpoint_config = new_objective(config, [source.spec for source in sources])
    checkpoint_config = initialised(checkpoint_config, objective, config, worker, checkpoint)
    set_up(objective, config.compute, worker.device)
    model = spread(objective, config.compute.sharding, worker)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    return objective, model, optimizer, checkpoint_config


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    targets: Sequence[Tensor],
    config: TrainConfig,
    worker: Worker,
) -> Update:
    """One optimizer step, left out where loss or gradient is not finite. Nothing here waits for the
    device."""
    updated = backward(model, optimizer, batch, targets, config, worker)
    optimizer.step()
    return updated


def backward(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    targets: Sequence[Tensor],
    config: TrainConfig,
    worker: Worker,
) -> Update:
    """The gradient of a step; ``optimizer.step`` then leaves the step out where loss or gradient is not
    finite.

    Each mask group is a forward and a backward of its own, so a batch of any size fits where a group fits.
    """
    bfloat16 = uses_bfloat16(config.compute.dtype, worker.device)
    autocast = functools.partial(torch.autocast, worker.device.type, dtype=torch.bfloat16)
    # The loss is a mean over the good clips of the global batch, so a rank weighs its own by everybody's
    # count.
    num_good = worker.sum(torch.full((), int(batch.clips.good.sum()), device=worker.device)).clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    loss, clip_losses = torch.zeros((), device=worker.device), []
    teacher_losses = torch.zeros(len(targets) if len(targets) > 1 else 0, device=worker.device)
    groups = batch.groups(targets, worker.device, num_passes(model, batch, config.batch_size, worker))
    # One context a step: autocast keeps the weights that it has cast until it ends, for all mask groups.
    with autocast(enabled=bfloat16):
        for group in groups:
            with gradients(model, exchange=group.last):
                losses = of_teachers(model(*group.inputs), len(targets))
                weighted = weighted_mean(losses, config.loss_shares) * group.good
                share = weighted.sum() / num_good
                with autocast(enabled=False):
                    (share * worker.world_size).backward()  # what is exchanged is the mean over the ranks
            loss += share.detach()
            if len(losses) > 1:
                teacher_losses += (torch.stack(losses).detach() * group.good).sum(1) / num_good
            clip_losses.append(weighted.detach())
    loss = worker.sum(loss.double())
    norm = clip_gradients(model, config.optim, batch.step)
    # Both: an infinite L1 loss has a finite gradient.
    optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells a fused optimizer
    return Update(
        loss=loss,
        teacher_losses=worker.sum(teacher_losses.double()) if len(targets) > 1 else teacher_losses,
        norm=norm,
        clip_losses=torch.cat(clip_losses)[: len(batch.clips.good)],
    )


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
            f" {precision(config.compute.dtype, worker.device)}"
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
