"""The training loop, top to bottom, for every objective and every source of targets; plain PyTorch."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.config import StudentRun, TeacherRun, TrainConfig
from common.data.reader import Reader
from common.model.checkpoint import CheckpointConfig, load_module, load_training, new_predictor, point_to, save_checkpoint
from common.model.flops import step_flops
from common.model.grid import token_grid
from common.model.teacher import TeacherSpec
from common.model.vit import Encoder, init_weights
from student_trainer.batches import Batches
from student_trainer.metrics import MetricsLog
from student_trainer.objective import Objective
from student_trainer.optim import new_optimizer, set_schedule
from student_trainer.run_directory import write_summary
from student_trainer.salt import Salt
from student_trainer.target_source import TargetSource, open_source, views_of
from student_trainer.vpixel import VPixel, pixel_width


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Where this process stands in the run."""

    rank: int
    world_size: int
    device: torch.device


def train(config: TrainConfig, worker: Worker, checkpoint: Path | None) -> None:
    """Runs ``config`` from ``checkpoint`` (None: from the start) to its last step; every rank calls it."""
    torch.set_num_threads(config.num_threads)
    reader = Reader(
        config.data, data_seed=config.data_seed, views=views_of(config), view=config.view, split=config.split, loader=config.loader
    )
    source = open_source(config, reader, run=Path(config.out).name) if isinstance(config, StudentRun) else None
    try:
        _train(config, worker, checkpoint, reader, source)
    finally:
        if source is not None:
            source.close()


def _train(config: TrainConfig, worker: Worker, checkpoint: Path | None, reader: Reader, source: TargetSource | None) -> None:
    out = Path(config.out)
    grid = token_grid(config.view, config.encoder)
    teacher = None if source is None else source.spec
    if teacher is not None and (teacher.grid != tuple(grid) or teacher.clip_shape != config.view.clip_shape):
        raise ValueError(
            f"got a teacher for clips {teacher.clip_shape} with token grid {teacher.grid}, expected clips {config.view.clip_shape} with token "
            f"grid {tuple(grid)}: choose the student's view and patch size to match the teacher's"
        )
    objective, checkpoint_config = new_objective(config, teacher)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    step = 0
    if checkpoint is not None:
        step = _restore(checkpoint, objective, optimizer, source)
        _say(worker, f"resuming {out} after step {step}")
    objective.to(worker.device)
    model: nn.Module = DistributedDataParallel(objective) if worker.world_size > 1 else objective
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
        flops_per_step=step_flops(
            num_clips=config.batch_size,
            num_tokens=grid.num_tokens,
            mask=config.mask,
            encoder_parameters=num_parameters(objective.encoder),
            predictor_parameters=num_parameters(objective.predictor),
            teacher_parameters=0 if teacher is None else teacher.num_parameters,
        ),
    )

    for future in batches.steps(step + 1, config.steps):
        waited_since = time.perf_counter()
        batch = future.result()
        waited_for_data = time.perf_counter() - waited_since
        target = None if batch.target is None else batch.target.result().to(worker.device, non_blocking=True)
        waited_for_teacher = time.perf_counter() - waited_since - waited_for_data

        step = batch.step
        pixels = torch.from_numpy(batch.clips.pixels).to(worker.device, non_blocking=True)
        good = torch.from_numpy(batch.clips.good).to(worker.device)
        masks = [group.to(worker.device) for group in batch.masks]
        lr, decay = set_schedule(optimizer, config.optim, step=step, steps=config.steps)
        losses = model(pixels, target, masks)
        # The loss is a mean over the good clips of the global batch, so a rank weighs its own by everybody's count.
        num_good = _sum_over_ranks(good.sum(), worker).clamp(min=1)
        loss = (losses.mean(0) * good).sum() / num_good
        optimizer.zero_grad(set_to_none=True)
        (loss * worker.world_size).backward()  # DistributedDataParallel divides by the world size
        norm = nn.utils.clip_grad_norm_(objective.parameters(), config.optim.clip_grad)
        optimizer.step()

        line = log.add(
            batch, loss.detach(), norm, data_wait_s=waited_for_data, teacher_wait_s=waited_for_teacher, lr=lr, weight_decay=decay
        )
        if line is not None and source is not None and worker.rank == 0:
            source.report(line)
        if step % config.keep_every == 0 or step == config.steps:
            log.require_finite(step)
            if worker.rank == 0:
                directory = out / "checkpoints" / f"step-{step}"
                training = {
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "slot": step * config.batch_size,
                    "rng": torch.get_rng_state(),
                    "teacher": None if teacher is None else json.dumps(teacher.to_json()),
                }
                save_checkpoint(
                    directory, checkpoint_config.model_copy(update={"step": step}), objective.encoder, objective.predictor, training
                )
                point_to(out, directory)
    log.close()
    if worker.rank == 0:
        write_summary(out, config, objective, source, reader)


def new_objective(config: TrainConfig, teacher: TeacherSpec | None) -> tuple[Objective, CheckpointConfig]:
    """The model of a run, initialised from its seed, and what its checkpoints say about it."""
    checkpoint_config = CheckpointConfig(
        objective="vpixel" if isinstance(config, TeacherRun) else "salt",
        step=0,
        encoder=config.encoder,
        predictor=config.predictor,
        predictor_out_width=pixel_width(config.encoder) if teacher is None else teacher.width,
        view=config.view,
        mask=config.mask,
        init_std=config.init_std,
        teacher_fingerprint=None if teacher is None else teacher.fingerprint,
    )
    generator = torch.Generator().manual_seed(config.seed)
    encoder, predictor = Encoder(config.encoder), new_predictor(checkpoint_config)
    init_weights(encoder, generator, std=config.init_std)
    predictor.init_weights(generator, std=config.init_std)
    if isinstance(config, TeacherRun):
        return VPixel(encoder, predictor, pixel_norm=config.pixel_norm), checkpoint_config
    return Salt(encoder, predictor), checkpoint_config


def _restore(checkpoint: Path, objective: Objective, optimizer: torch.optim.Optimizer, source: TargetSource | None) -> int:
    load_module(objective.encoder, checkpoint, "model.safetensors")
    load_module(objective.predictor, checkpoint, "predictor.safetensors")
    training = load_training(checkpoint)
    optimizer.load_state_dict(training["optimizer"])
    torch.set_rng_state(training["rng"])
    if source is not None:
        source.require(TeacherSpec.from_json(json.loads(training["teacher"])))
    return training["step"]


def num_parameters(module: nn.Module) -> int:
    """Weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _sum_over_ranks(value: Tensor, worker: Worker) -> Tensor:
    if worker.world_size > 1:
        dist.all_reduce(value)
    return value


def _say(worker: Worker, sentence: str) -> None:
    if worker.rank == 0:
        print(sentence, flush=True)
