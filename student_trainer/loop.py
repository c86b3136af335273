"""The training loop, top to bottom, for every objective and every source of targets; plain PyTorch."""

import contextlib
import functools
import json
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from salt_distill.common.config import StudentRun, TrainConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import CheckpointConfig, point_to, save_checkpoint
from salt_distill.common.model.compute import matrix_peak, prepare, set_up, uses_bfloat16
from salt_distill.common.model.flops import num_parameters, step_flops
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.student_trainer.batches import Batch, Batches
from salt_distill.student_trainer.metrics import MetricsLog, Update
from salt_distill.student_trainer.objective import Objective, new_objective
from salt_distill.student_trainer.optim import new_optimizer, set_schedule
from salt_distill.student_trainer.parallel import (
    clip_gradients,
    collect,
    gradients,
    num_passes,
    restore,
    spread,
)
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.run_directory import write_environment, write_summary
from salt_distill.student_trainer.storage import Uploads
from salt_distill.student_trainer.targets.client import require_same_teacher
from salt_distill.student_trainer.targets.source import TargetSource, open_source, source_order, views_of
from salt_distill.student_trainer.utilisation import Utilisation
from salt_distill.student_trainer.vjepa import VJepa


def train(config: TrainConfig, worker: Worker, checkpoint: Path | None) -> None:
    """Runs ``config`` from rank 0's ``checkpoint`` (None: from the start) to its last step; every rank calls
    it."""
    torch.set_num_threads(config.num_threads)
    prepare(worker.device)
    with ThreadPoolExecutor(1) as opening, contextlib.ExitStack() as stack:
        (reader, source), _ = worker.ranks.result(opening.submit(_open, config, worker, stack))
        worker.say(f"{config.data}: {reader.num_samples} samples, decoded by {reader.decoder}")
        if source is not None:
            assert isinstance(config, StudentRun), "only it has a source of targets"
            worker.say(f"targets of teacher {source.spec.fingerprint[:12]} from {source_order(config)}")
            specs = worker.ranks.all_values(source.spec)  # a service may have replicas on other devices
            for spec in specs:
                require_same_teacher(spec, specs[0])
        train_on(reader, source, config, worker, checkpoint)


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
    )
    stack.callback(reader.close)
    if not isinstance(config, StudentRun):
        return reader, None
    source = open_source(config, run=Path(config.out).name, rank=worker.rank, device=worker.device)
    stack.callback(source.close)
    return reader, source


def train_on(
    reader: Reader, source: TargetSource | None, config: TrainConfig, worker: Worker, checkpoint: Path | None
) -> None:
    """``train`` with clips from ``reader`` and, in stage 2, targets from ``source``."""
    out = Path(config.out)
    grid = token_grid(config.view, config.encoder)
    teacher = None if source is None else source.spec
    objective, checkpoint_config = new_objective(config, teacher)
    set_up(objective, config.compute, worker.device)
    model = spread(objective, config.compute.sharding, worker)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    step = 0
    training = restore(checkpoint, objective, optimizer, worker)
    if training is not None:
        step = training["step"]
        torch.set_rng_state(training["rng"])
        if source is not None:
            source.require(TeacherSpec.from_json(json.loads(training["teacher"])))
        worker.say(f"resuming {out} after step {step}")
    peaks = worker.ranks.all_values(matrix_peak(worker.device, config.compute.dtype))
    if worker.rank == 0:
        write_environment(
            out,
            config,
            worker.device,
            reader.decoder,
            world_size=worker.world_size,
            after_step=step,
            peak_flops_per_s=sum(peaks),
        )
    uploads = Uploads(out, config.storage if worker.rank == 0 else None)
    if checkpoint is not None:
        uploads.add(checkpoint)  # the copy may lag behind
    batches = Batches(
        reader=reader,
        source=source,
        mask=config.mask,
        grid=grid,
        seed=config.seed,
        batch_size=config.batch_size,
        rank=worker.rank,
        world_size=worker.world_size,
        prefetch_steps=config.loader.prefetch_steps,
    )
    log = MetricsLog(
        config,
        rank=worker.rank,
        world_size=worker.world_size,
        num_tokens=grid.num_tokens,
        num_sets=len(config.mask.sets),
        utilisation=Utilisation.of(
            config,
            out_width=checkpoint_config.predictor_out_width,
            target_flops=0.0 if source is None else source.clip_flops,
            peak_flops_per_s=sum(peaks),
        ),
        flops_per_step=step_flops(
            num_clips=config.batch_size,
            num_tokens=grid.num_tokens,
            mask=config.mask,
            encoder_parameters=num_parameters(objective.encoder),
            predictor_parameters=num_parameters(objective.predictor),
            teacher_parameters=_target_parameters(objective, teacher),
        ),
    )

    for future in batches.steps(step + 1, config.steps):
        batch, waited_for_data = worker.ranks.result(future)
        target, waited_for_teacher = (
            (None, 0.0) if batch.target is None else worker.ranks.result(batch.target)
        )

        step = batch.step
        lr, decay = set_schedule(optimizer, config.optim, step=step, steps=config.steps)
        done = update(model, optimizer, batch, target, config, worker)
        if isinstance(objective, VJepa):
            objective.move_target_encoder(step=step, steps=config.steps)

        line = log.add(
            batch,
            done,
            data_wait_s=waited_for_data,
            teacher_wait_s=waited_for_teacher,
            lr=lr,
            weight_decay=decay,
            of_source={} if source is None else source.metrics(),
        )
        if line is not None and source is not None and worker.rank == 0:
            source.report(line)
        if step % config.keep_every == 0 or step == config.steps:
            log.require_finite(step)
            worker.ranks.result(uploads.failure())
            uploads.add(
                write_checkpoint(out, step, objective, optimizer, checkpoint_config, config, teacher, worker)
            )
    log.close()
    skipped, counters = worker.ranks.all_values(reader.skipped), worker.ranks.all_values(reader.counters())
    if worker.rank == 0:
        totals = {name: sum(counts[name] for counts in counters) for name in counters[0]}
        write_summary(
            out,
            config,
            objective,
            source,
            decoder=reader.decoder,
            counters=totals,
            skipped=dict(ChainMap(*skipped)),
        )
    worker.ranks.result(uploads.finish())


def write_checkpoint(
    run: Path,
    step: int,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    checkpoint_config: CheckpointConfig,
    config: TrainConfig,
    teacher: TeacherSpec | None,
    worker: Worker,
) -> Path:
    """Where rank 0 now has what a run goes on from after ``step``; every rank takes part."""
    directory = run / "checkpoints" / f"step-{step}"
    state = collect(objective, optimizer, worker)
    if state is not None:
        training = {
            "optimizer": state.optimizer,
            "step": step,
            "slot": step * config.batch_size,
            "rng": torch.get_rng_state(),
            "teacher": None if teacher is None else json.dumps(teacher.to_json()),
        }
        checkpoint_config = checkpoint_config.model_copy(update={"step": step})
        save_checkpoint(directory, checkpoint_config, state.modules, training)
        point_to(run, directory)
    return directory


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    target: Tensor | None,
    config: TrainConfig,
    worker: Worker,
) -> Update:
    """One optimizer step, left out where loss or gradient is not finite. Nothing here waits for the device.

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
    optimizer.step()
    return Update(loss=loss, norm=norm, clip_losses=torch.cat(clip_losses)[: len(batch.clips.good)])


def _target_parameters(objective: Objective, teacher: TeacherSpec | None) -> int:
    """Weights of the encoder that makes the targets, for FLOPs."""
    if isinstance(objective, VJepa):
        return num_parameters(objective.target_encoder)
    return 0 if teacher is None else teacher.num_parameters
