"""How models compute: precision, memory for time, compilation, and how fast they could. What they compute
stays the same, up to rounding."""

import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn

from salt_distill.common.config import ComputeConfig, ComputeDtype
from salt_distill.common.model.vit import Attention, Block, Stack


def set_up(model: nn.Module, compute: ComputeConfig, device: torch.device) -> None:
    """Switches every block of ``model``. Raises ValueError where ``compile`` is on and this machine
    cannot."""
    if compute.compile:
        compile_blocks(model, device, key="compute.compile")
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpointing = compute.activation_checkpointing
        elif isinstance(module, Attention):
            module.explicit = compute.attention == "explicit"


def compile_blocks(model: nn.Module, device: torch.device, *, key: str) -> None:
    """Compiles every block of ``model``, or one of others as a whole. Raises ValueError where this machine
    cannot; ``key``: what asks for it."""
    _require_compilers(device, key)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in blocks or [model]:
        module.compile(
            dynamic=True
        )  # a block at a time, in place: blocks share the code, and state dicts keep their names


def uses_bfloat16(dtype: ComputeDtype, device: torch.device) -> bool:
    """Whether matrix products are cast to bfloat16 on this device."""
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")


def cast_products(model: nn.Module) -> None:
    """Casts the weights of matrix products to bfloat16 for good: the bits that autocast would make of them at
    every forward. For a model that is frozen."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            module.to(torch.bfloat16)


def matrix_peak(device: torch.device, dtype: ComputeDtype) -> float:
    """FLOP/s of the fastest of a few large matrix products on this device, with the threads that PyTorch has
    now: what MFU is a share of.

    Measured, since data sheets name what no product reaches, and CPUs have none.
    """
    size, repeats = (8192, 10) if device.type == "cuda" else (512, 1)
    product_dtype = torch.bfloat16 if uses_bfloat16(dtype, device) else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(product_dtype) for _ in range(2)
    )
    best_s = float("inf")
    for _ in range(8):
        wait_for(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(left, right)
        wait_for(device)
        best_s = min(best_s, time.perf_counter() - begun)
    return repeats * 2 * size**3 / best_s


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was given: for a clock around it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _require_compilers(device: torch.device, key: str) -> None:
    wanted = {"C++ compiler": os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")}
    if device.type == "cuda":
        wanted["C compiler"] = os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
    for kind, program in wanted.items():
        if shutil.which(program) is None:
            raise ValueError(
                f"got {key}=true, but {program} was not found: torch.compile needs a {kind} on every machine"
                f" that computes. Install one, name it in {'CXX' if kind == 'C++ compiler' else 'CC'}, or"
                " leave compile off"
            )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise ValueError(
            f"got {key}=true, but {sysconfig.get_path('include')} has no Python.h: torch.compile needs"
            " Python's headers. Install them (python3-dev), or leave compile off"
        )
