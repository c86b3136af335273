"""How a run computes: precision, memory for time, compilation. What it learns stays the same, up to rounding."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

from common.config import ComputeConfig
from common.model.vit import Attention, Block, Stack


def set_up(model: nn.Module, compute: ComputeConfig, device: torch.device) -> None:
    """Switches every block of ``model``. Raises ValueError where ``compile`` is on and this machine cannot."""
    if compute.compile:
        _require_compilers(device)
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpointing = compute.activation_checkpointing
        elif isinstance(module, Attention):
            module.explicit = compute.attention == "explicit"
        elif isinstance(module, Block) and compute.compile:
            module.compile(dynamic=True)  # a block at a time, in place: blocks share the code, and state dicts keep their names


def uses_bfloat16(compute: ComputeConfig, device: torch.device) -> bool:
    """Whether matrix products are cast to bfloat16 on this device."""
    return compute.dtype == "bfloat16" or (compute.dtype == "auto" and device.type == "cuda")


def _require_compilers(device: torch.device) -> None:
    wanted = {"C++ compiler": os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")}
    if device.type == "cuda":
        wanted["C compiler"] = os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
    for kind, program in wanted.items():
        if shutil.which(program) is None:
            raise ValueError(
                f"got compute.compile=true, but {program} was not found: torch.compile needs a {kind} on every machine that trains. Install one, "
                f"name it in {'CXX' if kind == 'C++ compiler' else 'CC'}, or leave compile off"
            )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise ValueError(
            f"got compute.compile=true, but {sysconfig.get_path('include')} has no Python.h: torch.compile needs Python's headers. Install them "
            "(python3-dev), or leave compile off"
        )
