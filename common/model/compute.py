"""How models compute: precision, memory for time, compilation, and how fast they could. What they compute
stays the same, up to rounding."""

import logging
import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from salt_distill.common.config import ComputeConfig, ComputeDtype
from salt_distill.common.model.vit import Attention, Block, Stack

logger = logging.getLogger(__name__)


def prepare(device: torch.device) -> None:
    """What a GPU wants before its first tensor; each setting holds for the whole process."""
    if device.type != "cuda":
        return
    # Mask groups keep other numbers of tokens in every step, so blocks of memory rarely fit again: without
    # segments that grow, what is free is in pieces that are too small.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    # Float32 means float32: TensorFloat32 has the mantissa of float16, and convolutions use it unless told.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def set_up(model: nn.Module, compute: ComputeConfig, device: torch.device) -> None:
    """Switches every block of ``model``. Raises ValueError where ``compile`` is true and this machine
    cannot."""
    if compiles(compute.compile, device, key="compute.compile"):
        compile_blocks(model, dynamic=True)
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpointing = compute.activation_checkpointing
        elif isinstance(module, Attention):
            module.explicit = compute.attention == "explicit"


def compiles(compile: Literal["auto"] | bool, device: torch.device, *, key: str) -> bool:
    """Whether a model on ``device`` is compiled: ``auto`` where it is a GPU beside which there are compilers.
    Raises ValueError where true is asked for and this machine cannot; ``key``: what asks."""
    if compile is False or (compile == "auto" and device.type != "cuda"):
        return False
    lack = _lack_of_compilers(device)
    if lack is not None and compile is True:
        raise ValueError(f"got {key}=true, but {lack}, or leave compile off")
    if lack is not None:
        logger.warning("%s=auto: nothing is compiled, so steps take longer: %s", key, lack)
    return lack is None


def compile_blocks(model: nn.Module, *, dynamic: bool) -> None:
    """Compiles every block of ``model``, or one of others as a whole. ``dynamic``: for any number of clips
    and tokens, which mask groups change; else for the shapes that come first."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in blocks or [model]:
        # A block at a time, in place: blocks share the code, and state dicts keep their names.
        module.compile(dynamic=dynamic)


def uses_bfloat16(dtype: ComputeDtype, device: torch.device) -> bool:
    """Whether matrix products are cast to bfloat16 on this device."""
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")


def precision(dtype: ComputeDtype, device: torch.device) -> Literal["float32", "bfloat16"]:
    """That of matrix products on this device."""
    return "bfloat16" if uses_bfloat16(dtype, device) else "float32"


def cast_products(model: nn.Module) -> None:
    """Casts the weights of matrix products to bfloat16 for good: the bits that autocast would make of them at
    every forward. For a model that is frozen."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            for name, parameter in list(module.named_parameters(recurse=False)):
                rounded = parameter.detach().to(torch.bfloat16)
                setattr(module, name, nn.Parameter(rounded, requires_grad=False))


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


def _lack_of_compilers(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, and how to get it; None where nothing."""
    programs = {"C++ compiler": os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")}
    if device.type == "cuda":
        programs["C compiler"] = os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
    for kind, program in programs.items():
        if shutil.which(program) is None:
            return (
                f"{program} was not found: torch.compile needs a {kind} on every machine that computes."
                f" Install one, name it in {'CXX' if kind == 'C++ compiler' else 'CC'}"
            )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return (
            f"{sysconfig.get_path('include')} has no Python.h: torch.compile needs Python's headers. Install"
            " them (python3-dev)"
        )
    return None
