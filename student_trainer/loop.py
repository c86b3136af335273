"""The training loop, top to bottom, for every objective and every source of targets; plain PyTorch."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from salt_distill.common.config import TrainConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import CheckpointConfig
from salt_distill.common.model.compute import set_up, uses_bfloat16
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
from salt_distill.student_trainer.targets.source import (
    TargetSource,
    require_teachers,
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
