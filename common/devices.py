"""Whether a command computes on GPUs: on those that there are, unless it is told otherwise."""

from collections.abc import Mapping
from typing import Protocol

import torch

from salt_distill.common.config import Device, TrainConfig, is_papers_size


class _OnWorkers(Protocol):
    @property
    def device(self) -> Device: ...

    @property
    def gpus_per_worker(self) -> float | None: ...


def device_here(config: _OnWorkers | None = None) -> torch.device:
    """That of a command's own process. ``config``: what was asked for, where the command has flags for it."""
    on_cpu = config is not None and (config.device == "cpu" or config.gpus_per_worker == 0)
    return torch.device("cuda" if not on_cpu and torch.cuda.is_available() else "cpu")


def gpus_of_worker(config: _OnWorkers, resources: Mapping[str, float]) -> float:
    """GPUs that Ray sets aside for a worker: what was asked for, else one where a Ray of such ``resources``
    has any."""
    if config.device == "cpu":
        return 0.0
    return gpus_or_any(config.gpus_per_worker, resources)


def gpus_or_any(asked: float | None, resources: Mapping[str, float]) -> float:
    """GPUs that were asked for; where none were named, one if Ray has any."""
    if asked is not None:
        return asked
    return 1.0 if resources.get("GPU", 0.0) >= 1 else 0.0


def resources_here() -> dict[str, float]:
    """GPUs that a private Ray of this machine finds, as Ray counts them."""
    return {"GPU": float(torch.cuda.device_count())}


def require_device(config: TrainConfig, resources: Mapping[str, float]) -> None:
    """Raises ValueError for an encoder of the paper's sizes that would be trained on a CPU, unless that was
    asked for: its first step would take all of the machine's memory, or hours.

    ``resources``: of the Ray that the run joins, or of this machine.
    """
    encoder = config.encoder
    if config.device == "cpu" or not is_papers_size(encoder) or gpus_of_worker(config, resources) > 0:
        return
    raise ValueError(
        f"got an encoder of width {encoder.width} and depth {encoder.depth} without a GPU, expected a GPU for"
        " the paper's sizes (--preset vit-b to vit-G, of which one is the default): run it on a machine or"
        " cluster that has one. On a CPU choose --preset nano, which learns in minutes, or train it all the"
        " same with --device cpu"
    )
