"""One model on many ranks, and its state as a whole: rank 0 alone reads and writes it, so the others need no disk of its."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.model.checkpoint import load_training, read_tensors
from student_trainer.objective import Objective
from student_trainer.ranks import Worker


def spread(objective: Objective, worker: Worker) -> nn.Module:
    """What a step calls in place of ``objective``, so that the ranks share its gradients. The parameters are on the rank's device from here on."""
    objective.to(worker.device)
    return DistributedDataParallel(objective) if worker.world_size > 1 else objective


def modules_of(objective: Objective) -> dict[str, nn.Module]:
    """What a checkpoint holds of the model, by the names of its files."""
    modules: dict[str, nn.Module] = {"model": objective.result, "predictor": objective.predictor}
    return modules if objective.result is objective.encoder else modules | {"online": objective.encoder}


@dataclass(frozen=True)
class _Read:
    """A checkpoint's content."""

    modules: dict[str, dict[str, Tensor]]
    optimizer: dict[int, dict[str, Tensor]]
    """The state of each parameter."""
    rest: dict[str, Any]
    """What is small: the rest of ``training.pt``, with the optimizer's groups."""


def restore(checkpoint: Path | None, objective: Objective, optimizer: torch.optim.Optimizer, worker: Worker) -> dict[str, Any] | None:
    """Fills the ranks from rank 0's ``checkpoint``; what else its ``training.pt`` holds. None, with nothing done, where rank 0 has none."""
    with ThreadPoolExecutor(1) as reading:
        read, _ = worker.ranks.result(reading.submit(_read, checkpoint, objective) if worker.rank == 0 else reading.submit(lambda: None))
    shapes = None if read is None else {idx: {name: tensor.shape for name, tensor in state.items()} for idx, state in read.optimizer.items()}
    rest, shapes = worker.ranks.all_values(None if read is None else (read.rest, shapes))[0] or (None, None)
    if rest is None or shapes is None:
        return None
    for file, module in modules_of(objective).items():
        for name, own in module.state_dict().items():
            _fill(own, None if read is None else read.modules[file][name], worker)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for idx, parameter in enumerate(parameters):
        state[idx] = {}
        for name, shape in shapes[idx].items():
            own = torch.zeros_like(parameter) if shape == parameter.shape else torch.zeros(shape, device=parameter.device)
            _fill(own, None if read is None else read.optimizer[idx][name], worker)
            state[idx][name] = own
    optimizer.load_state_dict({"state": state, "param_groups": rest.pop("param_groups")})
    return rest


def _read(checkpoint: Path | None, objective: Objective) -> _Read | None:
    if checkpoint is None:
        return None
    modules = {file: read_tensors(checkpoint, f"{file}.safetensors", module) for file, module in modules_of(objective).items()}
    rest = load_training(checkpoint)
    optimizer = rest.pop("optimizer")
    return _Read(modules, optimizer["state"], rest | {"param_groups": optimizer["param_groups"]})


@torch.no_grad()
def _fill(own: Tensor, whole: Tensor | None, worker: Worker) -> None:
    """Puts rank 0's ``whole`` tensor into every rank's own."""
    if whole is not None:
        own.copy_(whole)
    if worker.world_size > 1:
        dist.broadcast(own, 0)
