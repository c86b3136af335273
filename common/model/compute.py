"""How models compute: precision, memory for time, compilation. What they compute stays the same, up to rounding."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

from common.config import ComputeConfig, ComputeDtype
from common.model.vit import Attention, Block, Stack


def set_up(model: nn.Module, compute: ComputeConfig, device: torch.device) -> None:
    """Switches every block of ``model``. Raises ValueError where ``compile`` is on and this machine cannot."""
    if compute.compile:
        compile_blocks(model, device, key="compute.compile")
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpointing = compute.activation_checkpointing
        elif isinstance(module, Attention):
            module.explicit = compute.attention == "explicit"


def compile_blocks(model: nn.Module, device: torch.device, *, key: str) -> None:
    """Compiles every block of ``model``, or one of others as a whole. Raises ValueError where this machine cannot; ``key``: what asks for it."""
    _require_compilers(device, key)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in blocks or [model]:
        module.compile(dynamic=True)  # a block at a time, in place: blocks share the code, and state dicts keep their names


def uses_bfloat16(dtype: ComputeDtype, device: torch.device) -> bool:
    """Whether matrix products are cast to bfloat16 on this device."""
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")


def _require_compilers(device: torch.device, key: str) -> None:
    wanted = {"C++ compiler": os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")}
    if device.type == "cuda":
        wanted["C compiler"] = os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
    for kind, program in wanted.items():
        if shutil.which(program) is None:
            raise ValueError(
                f"got {key}=true, but {program} was not found: torch.compile needs a {kind} on every machine that computes. Install one, "
                f"name it in {'CXX' if kind == 'C++ compiler' else 'CC'}, or leave compile off"
            )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise ValueError(
            f"got {key}=true, but {sysconfig.get_path('include')} has no Python.h: torch.compile needs Python's headers. Install them "
            "(python3-dev), or leave compile off"
        )
