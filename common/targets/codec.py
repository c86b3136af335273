"""Targets as bytes: the rounding and layout that wire, cache and in-process teachers share (DESIGN section 4, Target)."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Buffer

from common.config import TargetDtype

TARGET_DTYPES: tuple[TargetDtype, ...] = ("float16", "bfloat16", "int8")

_STORAGE = {"float16": pa.float16(), "bfloat16": pa.uint16(), "int8": pa.int8()}
_BYTES_PER_VALUE = {"float16": 2, "bfloat16": 2, "int8": 1}
_SCALE_BYTES = 4


class CorruptTargetError(ValueError):
    """The bytes of a target are not the ones that were encoded."""


@dataclass(frozen=True, kw_only=True)
class EncodedTarget:
    """One clip's target, little-endian, tokens time-major."""

    target: Buffer
    """n * d values: float16, bfloat16 or int8."""
    scale: Buffer | None
    """int8 only: one float32 per token."""
    checksum: int
    """xxh3-64 of the target bytes, then the scale bytes."""

    @property
    def num_bytes(self) -> int:
        """Size of target and scale."""
        return memoryview(self.target).nbytes + (0 if self.scale is None else memoryview(self.scale).nbytes)


def encode(targets: Float[Tensor, "b n d"], dtype: TargetDtype) -> list[EncodedTarget]:
    """Each row in ``dtype``; rounds on the tensor's own device. Raises ValueError where a target is not finite."""
    if not torch.stack(torch.aminmax(targets)).isfinite().all():  # a NaN is the minimum and the maximum of what it is in
        raise ValueError("got targets with values that are not finite, expected LayerNormed latents: the teacher's weights are damaged")
    if dtype == "int8":
        scales = targets.abs().amax(-1) / 127
        divisor = torch.where(scales > 0, scales, torch.ones_like(scales))[..., None]
        values = (targets / divisor).round().clamp(-128, 127).to(torch.int8)
        return [_encoded(target, scale) for target, scale in zip(values.cpu().numpy(), scales.cpu().numpy(), strict=True)]
    if dtype == "float16":
        return [_encoded(target, None) for target in targets.half().cpu().numpy()]
    return [_encoded(target, None) for target in targets.bfloat16().view(torch.uint16).cpu().numpy()]


def decode(encoded: EncodedTarget, dtype: TargetDtype, *, num_tokens: int, width: int) -> Float[Tensor, "n d"]:
    """The target in float32, as a student uses it."""
    out = torch.empty(num_tokens, width)
    decode_into(out, encoded, dtype)
    return out


def decode_into(out: Float[Tensor, "n d"], encoded: EncodedTarget, dtype: TargetDtype) -> None:
    """Fills ``out``, one row of a batch that the caller owns, without a copy in between. Raises CorruptTargetError."""
    verify(encoded, dtype, num_tokens=out.shape[0], width=out.shape[1])
    values = _tensor(encoded.target, _STORAGE[dtype]).view(out.shape)
    if encoded.scale is not None:  # numpy: multiplying int8 by float32 takes torch five times as long
        scales = np.frombuffer(memoryview(encoded.scale), dtype="<f4")
        np.multiply(values.numpy(), scales[:, None], out=out.numpy())
    else:
        out.copy_(values.view(torch.bfloat16) if dtype == "bfloat16" else values)


def verify(encoded: EncodedTarget, dtype: TargetDtype, *, num_tokens: int, width: int) -> None:
    """Raises CorruptTargetError unless sizes and checksum are right."""
    got = (memoryview(encoded.target).nbytes, 0 if encoded.scale is None else memoryview(encoded.scale).nbytes)
    expected = (num_tokens * width * _BYTES_PER_VALUE[dtype], num_tokens * _SCALE_BYTES if dtype == "int8" else 0)
    if got != expected:
        raise CorruptTargetError(f"got {got[0]} target and {got[1]} scale bytes, expected {expected[0]} and {expected[1]} for {dtype}")
    if (checksum := checksum_of(encoded.target, encoded.scale)) != encoded.checksum:
        raise CorruptTargetError(f"got a target with checksum {checksum:016x}, expected {encoded.checksum:016x}: its bytes were damaged")


def take_tokens(encoded: EncodedTarget, token_idx: Int[np.ndarray, " k"], *, num_tokens: int) -> EncodedTarget:
    """The target of only those tokens."""
    target = np.frombuffer(memoryview(encoded.target), dtype=np.uint8).reshape(num_tokens, -1)[token_idx]
    scale = None if encoded.scale is None else np.frombuffer(memoryview(encoded.scale), dtype="<f4")[token_idx]
    return _encoded(target, scale)


def num_bytes(dtype: TargetDtype, num_tokens: int, width: int) -> int:
    """Size of one encoded target with its scales."""
    return num_tokens * (width * _BYTES_PER_VALUE[dtype] + (_SCALE_BYTES if dtype == "int8" else 0))


def checksum_of(target: Buffer, scale: Buffer | None) -> int:
    """xxh3-64 of the target bytes, then the scale bytes."""
    hasher = xxhash.xxh3_64(target)
    if scale is not None:
        hasher.update(scale)
    return hasher.intdigest()


def _encoded(target: np.ndarray, scale: np.ndarray | None) -> EncodedTarget:
    scale_bytes = None if scale is None else np.ascontiguousarray(scale).data.cast("B")
    target_bytes = np.ascontiguousarray(target).data.cast("B")
    return EncodedTarget(target=target_bytes, scale=scale_bytes, checksum=checksum_of(target_bytes, scale_bytes))


def _tensor(data: Buffer, storage: pa.DataType) -> Tensor:
    """Bytes as a tensor without a copy. By DLPack, since torch warns of every read-only buffer that it is given directly."""
    num_values = memoryview(data).nbytes * 8 // storage.bit_width
    return torch.from_dlpack(pa.Array.from_buffers(storage, num_values, [None, pa.py_buffer(data)]))
