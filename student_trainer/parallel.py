"""One model on many ranks, and its state as a whole: rank 0 alone reads and writes it, so the others need no
disk of its."""

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from salt_distill.common.config import OptimConfig, Sharding
from salt_distill.common.model.checkpoint import load_training, read_tensors
from salt_distill.common.model.masking import most_groups
from salt_distill.common.model.vit import Block
from salt_distill.student_trainer.batches import Batch
from salt_distill.student_trainer.objective import Objective, modules_of
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.resume import Position


def spread(objective: Objective, sharding: Sharding, worker: Worker) -> nn.Module:
    """What a step calls in place of ``objective``, so that the ranks share its gradients. The parameters are
    on the rank's device from here on.

    Note [sharding]: of a sharded model each rank holds a slice of every parameter, its gradient and its
    optimizer state. A block's parameters are whole on a rank only while the block computes; they travel in
    float32, so that autocast computes what it computes without sharding.
    """
    if worker.world_size == 1 or sharding == "ddp":
        objective.to(worker.device)
        return DistributedDataParallel(objective) if worker.world_size > 1 else objective
    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    for block in [module for module in objective.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def num_passes(model: nn.Module, batch: Batch, batch_size: int, worker: Worker) -> int:
    """Forwards and backwards of a step. Ranks that gather a sharded model's blocks all take as many, also one
    that has fewer mask groups."""
    return most_groups(batch_size, worker.world_size) if isinstance(model, FSDPModule) else len(batch.masks)


@contextlib.contextmanager
def gradients(model: nn.Module, *, exchange: bool) -> Iterator[None]:
    """Inside, a backward adds to the gradients; ranks exchange them where ``exchange``, once a step with
    their last mask group."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchange)
    with (
        model.no_sync()
        if isinstance(model, DistributedDataParallel) and not exchange
        else contextlib.nullcontext()
    ):
        yield


def clip_gradients(model: nn.Module, optim: OptimConfig, step: int) -> Tensor:
    """The norm of the whole gradient of a step, before it is cut."""
    objective = model.module if isinstance(model, DistributedDataParallel) else model
    parts = (
        [objective.get_submodule(name) for name in ("encoder", "predictor")]
        if optim.clip == "separate"
        else [objective]
    )
    largest_norm = math.inf if optim.clip_after_warmup and step <= optim.warmup_steps else optim.clip_grad
    norms = [whole(nn.utils.clip_grad_norm_(part.parameters(), largest_norm)) for part in parts]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that ranks may each hold a slice of; all of them ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class State:
    """Model and optimizer as a checkpoint has them."""

    modules: dict[str, dict[str, Tensor]]
    """The tensors of each file."""
    optimizer: dict[str, Any]
    """Its state dict."""


def collect(objective: Objective, optimizer: torch.optim.Optimizer, worker: Worker) -> State | None:
    """The whole state, on rank 0; every rank takes part."""

    def kept(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        full = tensor.full_tensor()  # one at a time: together they would not fit a device
        return full.cpu() if worker.rank == 0 else torch.empty(0)

    modules = {
        file: {name: kept(tensor) for name, tensor in module.state_dict().items()}
        for file, module in modules_of(objective).items()
    }
    of_optimizer = optimizer.state_dict()
    state = {
        idx: {name: kept(tensor) for name, tensor in values.items()}
        for idx, values in of_optimizer["state"].items()
    }
    return State(modules, of_optimizer | {"state": state}) if worker.rank == 0 else None


def restore(
    checkpoint: Path | None, objective: Objective, optimizer: torch.optim.Optimizer, worker: Worker
) -> Position | None:
    """Fills the ranks from rank 0's ``checkpoint``; where the run stood there. None, with nothing done, where
    rank 0 has none."""
    with ThreadPoolExecutor(1) as reading:
        (state, position), _ = worker.ranks.result(
            reading.submit(_read, checkpoint if worker.rank == 0 else None, objective)
        )
    shapes: dict[int, dict[str, torch.Size]] = {}
    if state is not None:
        shapes = {
            idx: {name: tensor.shape for name, tensor in values.items()}
            for idx, values in state.optimizer["state"].items()
        }
    position, shapes, groups = worker.ranks.all_values(
        (position, shapes, state and state.optimizer["param_groups"])
    )[0]
    if position is None:
        return None
    for file, module in modules_of(objective).items():
        for name, part in module.state_dict().items():
            _fill(part, None if state is None else state.modules[file][name], worker)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    filled: dict[int, dict[str, Tensor]] = {}
    for idx, of_parameter in shapes.items():
        filled[idx] = {}
        for name, shape in of_parameter.items():
            like = parameters[idx]
            part = torch.zeros_like(like) if shape == like.shape else torch.zeros(shape, device=like.device)
            _fill(part, None if state is None else state.optimizer["state"][idx][name], worker)
            filled[idx][name] = part
    optimizer.load_state_dict({"state": filled, "param_groups": groups})
    return position


def _read(checkpoint: Path | None, objective: Objective) -> tuple[State | None, Position | None]:
    """A checkpoint's state, and where the run stood."""
    if checkpoint is None:
        return None, None
    modules = {
        file: read_tensors(checkpoint, f"{file}.safetensors", module)
        for file, module in modules_of(objective).items()
    }
    training = load_training(checkpoint)
    return State(modules, training.pop("optimizer")), Position(**training)


@torch.no_grad()
def _fill(part: Tensor, full: Tensor | None, worker: Worker) -> None:
    """Puts rank 0's whole tensor into what each rank holds of it."""
    if isinstance(part, DTensor):
        source = (
            torch.empty(part.shape, dtype=part.dtype, device=worker.device)
            if full is None
            else full.to(worker.device)
        )
        part.copy_(
            distribute_tensor(source, part.device_mesh, part.placements)
        )  # it is rank 0's that is scattered
        return
    if full is not None:
        part.copy_(full)
    if worker.world_size > 1:
        dist.broadcast(part, 0)
