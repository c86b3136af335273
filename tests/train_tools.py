"""Training without files: clips from random bytes, a small run, its losses and gradients. What the tests of
the loop share."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from salt_distill.common.clip import ClipBatch, clip_digest
from salt_distill.common.config import ComputeConfig, TrainConfig, VJepaRun
from salt_distill.common.data.hold_out import HeldOut
from salt_distill.common.draws import words
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.checkpoint import CheckpointConfig
from salt_distill.common.model.compute import set_up
from salt_distill.common.model.grid import token_grid
from salt_distill.student_trainer.batches import Batch, Batches
from salt_distill.student_trainer.loop import Worker, train_on
from salt_distill.student_trainer.objective import Objective, modules_of, new_objective
from salt_distill.student_trainer.opening import opened
from salt_distill.student_trainer.run_directory import claimed

CPU = torch.device("cpu")
ALONE = Worker(rank=0, world_size=1, device=CPU)
BAD_SLOT = 7
SMALL = {
    "data": "none",
    "steps": 10,
    "batch_size": 30,  # a mask group of 24 and one of 6
    "init_std": 0.07,
    "encoder": {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64, "patch_size": 8},
    "predictor": {
        "width": 32,
        "depth": 1,
        "num_heads": 2,
        "mlp_width": 64,
    },  # blocks as the encoder's, so that they compile once
    "view": {"num_frames": 4, "frame_step": 1, "crop_size": 32},
    "optim": {"warmup_steps": 3, "clip_grad": 1e9},
}


class RandomClips:
    """A ``Reader`` whose clips are counter-based random bytes: no file, no decoder. One slot is bad."""

    decoder = "none"
    index_hash = "random"
    num_samples = 0

    def __init__(self, clip_shape: tuple[int, int, int, int], num_held_out: int = 0) -> None:
        self.clip_shape = clip_shape
        rows = np.arange(num_held_out, dtype=np.int32)
        self.held_out = HeldOut(split="val", rows=rows, is_from_training=False) if num_held_out else None
        self.dataset = self
        self.skipped: dict[str, str] = {}
        self.slots: set[int] = set()

    def count_on(self, *, num_clips, num_bad):
        pass

    def counters(self):
        return {"clips": len(self.slots)}

    def take(self, rows):
        """What is held out, as a data set gives it."""
        return [SimpleNamespace(key=f"val/{row}", labels={"parity": int(row) % 2}) for row in rows]

    def view(self, samples, number):
        return self._batch([10_000 + int(sample.key.removeprefix("val/")) for sample in samples])

    def clips(self, slots):
        self.slots.update(slots)
        return self._batch(slots)

    def _batch(self, slots):
        if BAD_SLOT in slots:
            self.skipped[f"random/{BAD_SLOT}"] = "it is the bad one"
        size = int(np.prod(self.clip_shape))
        pixels = np.stack(
            [
                words(0, "random clip", slot, size // 8).view(np.uint8).reshape(self.clip_shape)
                for slot in slots
            ]
        )
        good = np.array([slot != BAD_SLOT for slot in slots])
        pixels[~good] = 0
        return ClipBatch(
            pixels=pixels,
            digests=tuple(clip_digest(clip) for clip in pixels),
            keys=tuple(f"random/{slot}" for slot in slots),
            views=(0,) * len(slots),
            good=good,
        )


def small_run(run: type[TrainConfig] = VJepaRun, **values) -> TrainConfig:
    """A run that fits in milliseconds."""
    return run.model_validate(SMALL | {"out": "none"} | values)


def metrics_line(**values) -> MetricsLine:
    """A line of metrics with these values, and zeros elsewhere."""
    required = (name for name, field in MetricsLine.model_fields.items() if field.is_required())
    return MetricsLine.model_validate(dict.fromkeys(required, 0) | values)


def batch_of(config: TrainConfig, step: int = 1) -> Batch:
    """What the loop takes in a step, for one worker without a source of targets."""
    batches = Batches(
        reader=RandomClips(config.view.clip_shape),  # type: ignore[arg-type]
        sources=(),
        mask=config.mask,
        grid=token_grid(config.view, config.encoder),
        seed=config.seed,
        batch_size=config.batch_size,
        rank=0,
        world_size=1,
        prefetch_steps=1,
    )
    return next(batches.steps(step, step)).result()


def new_model(config: TrainConfig) -> tuple[Objective, CheckpointConfig]:
    """The model of a run, with mask tokens that are not zero: their gradient then reaches what is before
    them."""
    objective, checkpoint_config = new_objective(config)
    torch.nn.init.normal_(objective.predictor.mask_tokens, generator=torch.Generator().manual_seed(1))
    return objective, checkpoint_config


def tensors_of(objective: Objective) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds of a model."""
    return {name: module.state_dict() for name, module in modules_of(objective).items()}


def train(config: TrainConfig, worker: Worker = ALONE) -> None:
    """Runs ``config`` as its command does, from its newest checkpoint."""
    with claimed(config) as checkpoint, opened(config, worker) as (reader, sources):
        train_on(reader, sources, config, worker, checkpoint)


def train_on_random_clips(config: TrainConfig, worker: Worker = ALONE) -> None:
    """Runs ``config`` from its start, without files of data."""
    clips = RandomClips(config.view.clip_shape, num_held_out(config))
    train_on(clips, (), config, worker, None)  # type: ignore[arg-type]


def num_held_out(config: TrainConfig) -> int:
    """Clips that a run holds out."""
    return 0 if config.val_every is None else config.val_clips


@dataclass(frozen=True)
class Piece:
    """A start of a run, from its newest checkpoint to the end or until it is stopped."""

    config: TrainConfig
    num_workers: int
    last_step: int


def train_in_processes(pieces: list[Piece], folder: Path) -> list[list[int]]:
    """Runs the pieces one after the other, in plain PyTorch; the slots that each asked for, in order.
    ``folder``: an empty one."""
    torch.multiprocessing.spawn(
        _train_rank, (pieces, folder), nprocs=max(piece.num_workers for piece in pieces)
    )
    of_ranks = [
        [json.loads((folder / f"slots-{number}-{rank}").read_text()) for rank in range(piece.num_workers)]
        for number, piece in enumerate(pieces)
    ]
    return [sorted(slot for slots in ranks for slot in slots) for ranks in of_ranks]


def _train_rank(rank: int, pieces: list[Piece], folder: Path) -> None:
    torch.set_num_threads(1)
    for number, piece in enumerate(pieces):
        if rank >= piece.num_workers:
            continue
        store = f"file://{folder / f'store-{number}'}"
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=piece.num_workers
        )
        clips = ClipsUntil(piece.config, piece.last_step)
        worker = Worker(rank=rank, world_size=piece.num_workers, device=CPU)
        with (
            claimed(piece.config) if rank == 0 else contextlib.nullcontext() as checkpoint,
            contextlib.suppress(StoppedError),
        ):
            train_on(clips, (), piece.config, worker, checkpoint)  # type: ignore[arg-type]
        (folder / f"slots-{number}-{rank}").write_text(json.dumps(clips.asked))
        torch.distributed.destroy_process_group()


class StoppedError(RuntimeError):
    """The run ends here."""


class ClipsUntil(RandomClips):
    """Those of the steps until ``last_step``; after it the run is stopped. ``asked``: every slot that was
    given, as often as it was."""

    def __init__(self, config: TrainConfig, last_step: int) -> None:
        super().__init__(config.view.clip_shape, num_held_out(config))
        self.asked: list[int] = []
        self._end = last_step * config.batch_size

    def clips(self, slots):
        if slots.stop > self._end:
            raise StoppedError(f"slot {self._end}")
        self.asked += slots
        return super().clips(slots)


def losses_and_gradients(compute: ComputeConfig, *, more_steps: int = 0) -> dict[str, torch.Tensor]:
    """Of every clip and mask set, and of every parameter, over two mask groups of different size.
    ``more_steps``: how many follow, whose masks keep other numbers of tokens."""
    torch.set_num_threads(1)
    config = small_run()
    objective, _ = new_model(config)
    set_up(objective, compute, CPU)
    losses = torch.cat(
        [objective(*group.inputs) for group in batch_of(config).groups((), CPU)],
        dim=1,
    )
    losses.mean().backward()
    gradients = {
        name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None
    }
    results = {
        "losses": losses.detach().clone(),
        **{name: tensor.clone() for name, tensor in gradients.items()},
    }
    for step in range(2, 2 + more_steps):
        for group in batch_of(config, step).groups((), CPU):
            objective(*group.inputs).mean().backward()
    return results


def save_losses_and_gradients(compute: ComputeConfig, path: Path, *, more_steps: int) -> None:
    """The same into a file: for a process without the type checks of the tests, which torch.compile cannot
    look through."""
    from safetensors.torch import save_file

    save_file(losses_and_gradients(compute, more_steps=more_steps), path)
