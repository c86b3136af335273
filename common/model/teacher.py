"""The frozen teacher: clips to targets, a pure function of each clip."""

import hashlib
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from salt_distill.common.config import EncoderConfig, FrozenConfig, TeacherComputeConfig
from salt_distill.common.devices import device_here
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.compute import (
    cast_products,
    compile_blocks,
    compiles,
    prepare,
    uses_bfloat16,
)
from salt_distill.common.model.flops import FORWARD_FLOPS, encoder_forward, num_parameters
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.pixels import normalise

TARGET_NORM_EPS = 1e-5
"""Of the LayerNorm without affine over a target's channels (V-JEPA's code; the paper's Eq. 1 leaves it
open)."""


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """What a target depends on beside the clip. Two specs with equal fingerprint and compute give equal
    bits."""

    name: str
    """For people: the run directory's name."""
    fingerprint: str
    """sha256 of architecture and weights. See Note [fingerprint]."""
    compute: dict[str, str | int | bool]
    """Device kind, dtype, batch size, threads, versions, compiled."""
    clip_shape: tuple[int, int, int, int]
    """(t, h, w, 3) of the clips that it takes."""
    grid: tuple[int, int, int]
    """(t, h, w) of its tokens."""
    width: int
    """Channels of a target token."""
    num_parameters: int
    """Weights of the encoder, for FLOPs."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a target."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The spec in ``to_json``'s form."""
        return cls(**{**values, "clip_shape": tuple(values["clip_shape"]), "grid": tuple(values["grid"])})


class Teacher:
    """A frozen encoder behind a fixed batch size, so that a target is the same bits whatever clips it shared
    a forward with."""

    def __init__(
        self, encoder: FrozenEncoder, compute: TeacherComputeConfig, device: torch.device | None = None
    ) -> None:
        """Loads the weights; on a GPU where there is one, unless ``device`` says otherwise."""
        if device is None:
            device = device_here()
        prepare(device)
        compiled = compiles(compute.compile, device, key="teacher.compile")
        grid = encoder.grid
        self._module = encoder.load().to(device).eval().requires_grad_(False)
        self._bfloat16 = uses_bfloat16(compute.dtype, device)
        self._mean, self._std, self._compute, self.device = encoder.mean, encoder.std, compute, device
        self._lock = threading.Lock()
        self.spec = TeacherSpec(
            name=encoder.name,
            fingerprint=fingerprint(encoder, self._module),
            compute={
                "device": device_kind(device),
                "dtype": "bfloat16" if self._bfloat16 else "float32",
                "batch_size": compute.batch_size,
                "num_threads": compute.num_threads,
                "torch": torch.__version__,
                **encoder.libraries,
                "compiled": compiled,
            },
            clip_shape=encoder.view.clip_shape,
            grid=(grid.t, grid.h, grid.w),
            width=encoder.config.width,
            num_parameters=num_parameters(self._module),
        )
        config, num_tokens = encoder.config, self.spec.num_tokens
        self.clip_flops: float = (
            encoder_forward(config, num_tokens).total
            if isinstance(config, EncoderConfig)
            else FORWARD_FLOPS * self.spec.num_parameters * num_tokens
        )
        """Of the matrix products of a clip's forward; 2ND where the architecture is not ours."""
        if self._bfloat16:
            cast_products(self._module)
        if compiled:
            # One shape for ever: every forward is of one padded batch.
            compile_blocks(self._module, dynamic=False)

    @classmethod
    def load(
        cls, path: str | Path, compute: TeacherComputeConfig, device: torch.device | None = None
    ) -> Self:
        """The teacher in a checkpoint, for the clips that it was trained on."""
        return cls(open_encoder(FrozenConfig(ckpt=str(path))), compute, device)

    @torch.inference_mode()
    def forward(self, clips: UInt8[np.ndarray, "b t h w 3"]) -> Float[Tensor, "b n d"]:
        """Targets in float32, on the teacher's device: final LayerNorm, then LayerNorm without affine (DESIGN
        section 4, Target)."""
        if clips.shape[1:] != self.spec.clip_shape or not 1 <= len(clips) <= self._compute.batch_size:
            raise ValueError(
                f"got clips {clips.shape}, expected 1 to {self._compute.batch_size} of {self.spec.clip_shape}"
                " (frames, height, width, channels)"
            )
        padded = np.zeros((self._compute.batch_size, *clips.shape[1:]), dtype=np.uint8)
        padded[: len(clips)] = clips
        with self._lock:  # torch's thread count is global to the process
            threads = torch.get_num_threads()
            torch.set_num_threads(self._compute.num_threads)
            try:
                pixels = torch.from_numpy(padded).to(self.device, non_blocking=True)
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
                    latents = self._module(normalise(pixels, self._mean, self._std))
                targets = F.layer_norm(latents.float(), (self.spec.width,), eps=TARGET_NORM_EPS)
            finally:
                torch.set_num_threads(threads)
        return targets[: len(clips)]


def device_kind(device: torch.device) -> str:
    """The device's model as far as it decides bits: the vector extension of a CPU, the name of a GPU."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def fingerprint(encoder: FrozenEncoder, module: nn.Module) -> str:
    """A teacher's identity, hexadecimal; ``module`` is the encoder's, loaded.

    Note [fingerprint]: sha256 of canonical JSON (sorted keys, no spaces) of what a target depends on beside
    the weights: architecture with rope and input normalisation, the layer, the norms with their eps. Then per
    tensor, sorted by our name: name, dtype, shape, little-endian bytes. Wire dtype and compute stand beside
    it, since they do not change which teacher it is; nor does the file format.
    """
    architecture = {
        "encoder": encoder.config.model_dump(mode="json"),
        "input": {"mean": encoder.mean, "std": encoder.std},
        "layer": "final",
        "norms": [
            {"affine": True, "eps": encoder.config.norm_eps},
            {"affine": False, "eps": TARGET_NORM_EPS},
        ],
    }
    hasher = hashlib.sha256(json.dumps(architecture, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(
            json.dumps(
                [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)], separators=(",", ":")
            ).encode()
        )
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
