"""Targets as bytes: the rounding and layout that wire, cache and in-process teachers share (DESIGN section 4,
Target)."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Buffer

from salt_distill.common.config import TargetDtype

TARGET_DTYPES: tuple[TargetDtype, ...] = ("float16", "bfloat16", "int8")

_STORAGE = {"float16": pa.float16(), "bfloat16": pa.uint16(), "int8": pa.int8()}
_VALUES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_BYTES_PER_VALUE = {"float16": 2, "bfloat16": 2, "int8": 1}
_SCALE_BYTES = 4
_TOGETHER_BYTES = 1_000_000
"""Targets that are widened at once, in bytes: small ones many at a time, and no more than a processor still
has near from checking them."""


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
    """Each row in ``dtype``; rounds on the tensor's own device. Raises ValueError where a target is not
    finite."""
    if (
        not torch.stack(torch.aminmax(targets)).isfinite().all()
    ):  # a NaN is the minimum and the maximum of what it is in
        raise ValueError(
            "got targets with values that are not finite, expected LayerNormed latents: the teacher's weights"
            " are damaged"
        )
    if dtype == "int8":
        scales = targets.abs().amax(-1) / 127
        divisor = torch.where(scales > 0, scales, torch.ones_like(scales))[..., None]
        values = (targets / divisor).round().clamp(-128, 127).to(torch.int8)
        return [
            _encoded(target, scale)
            for target, scale in zip(values.cpu().numpy(), scales.cpu().numpy(), strict=True)
        ]
    if dtype == "float16":
        return [_encoded(target, None) for target in targets.half().cpu().numpy()]
    return [_encoded(target, None) for target in targets.bfloat16().view(torch.uint16).cpu().numpy()]


def decode(
    encoded: EncodedTarget, dtype: TargetDtype, *, num_tokens: int, width: int
) -> Float[Tensor, "n d"]:
    """The target in float32, as a student uses it."""
    out = torch.empty(num_tokens, width)
    decode_into(out, encoded, dtype)
    return out


def decode_into(out: Float[Tensor, "n d"], encoded: EncodedTarget, dtype: TargetDtype) -> None:
    """Fills ``out``, one row of a batch that the caller owns, without a copy in between. Raises
    CorruptTargetError."""
    verify(encoded, dtype, num_tokens=out.shape[0], width=out.shape[1])
    values = _tensor(encoded.target, _STORAGE[dtype]).view(_VALUES[dtype]).view(out.shape)
    _widen(values, None if encoded.scale is None else _floats(encoded.scale), out)


def decode_whole(
    encoded: Iterable[EncodedTarget | None], out: Float[Tensor, "b n d"], dtype: TargetDtype
) -> None:
    """Fills ``out`` with a batch of targets that ``verify`` has found whole, with zeros where there is None.

    The bits are those of ``decode_into``. A target of some kilobytes costs more in calls than in bytes, so
    such targets are gathered and widened together.
    """
    _, num_tokens, width = out.shape
    target_bytes = num_tokens * width * _BYTES_PER_VALUE[dtype]
    size = max(1, min(len(out), _TOGETHER_BYTES // target_bytes))
    gathered = np.empty((size, target_bytes), dtype=np.uint8)
    scales = np.empty((size, num_tokens), dtype=np.float32) if dtype == "int8" else None
    values = torch.from_numpy(gathered).view(_VALUES[dtype]).view(size, num_tokens, width)
    left = iter(encoded)
    for rows in out.split(size):
        for number, one in enumerate(itertools.islice(left, len(rows))):
            gathered[number] = 0 if one is None else np.frombuffer(memoryview(one.target), dtype=np.uint8)
            if scales is not None:
                scales[number] = 0 if one is None or one.scale is None else _floats(one.scale)
        _widen(values[: len(rows)], None if scales is None else scales[: len(rows)], rows)


def verify(encoded: EncodedTarget, dtype: TargetDtype, *, num_tokens: int, width: int) -> None:
    """Raises CorruptTargetError unless sizes and checksum are right."""
    got = (
        memoryview(encoded.target).nbytes,
        0 if encoded.scale is None else memoryview(encoded.scale).nbytes,
    )
    expected = (
        num_tokens * width * _BYTES_PER_VALUE[dtype],
        num_tokens * _SCALE_BYTES if dtype == "int8" else 0,
    )
    if got != expected:
        raise CorruptTargetError(
            f"got {got[0]} target and {got[1]} scale bytes, expected {expected[0]} and {expected[1]} for"
            f" {dtype}"
        )
    if (checksum := checksum_of(encoded.target, encoded.scale)) != encoded.checksum:
        raise CorruptTargetError(
            f"got a target with checksum {checksum:016x}, expected {encoded.checksum:016x}: its bytes were"
            " damaged"
        )


def take_tokens(
    encoded: EncodedTarget, token_idx: Int[np.ndarray, " k"], *, num_tokens: int
) -> EncodedTarget:
    """The target of only those tokens."""
    target = np.frombuffer(memoryview(encoded.target), dtype=np.uint8).reshape(num_tokens, -1)[token_idx]
    scale = (
        None if encoded.scale is None else np.frombuffer(memoryview(encoded.scale), dtype="<f4")[token_idx]
    )
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
    return EncodedTarget(
        target=target_bytes, scale=scale_bytes, checksum=checksum_of(target_bytes, scale_bytes)
    )


def _widen(values: Tensor, scales: Float[np.ndarray, "*b n"] | None, out: Float[Tensor, "*b n d"]) -> None:
    """Fills ``out`` with values times the scales of their tokens."""
    if scales is None:
        out.copy_(values)
    else:  # numpy: multiplying int8 by float32 takes torch five times as long
        np.multiply(values.numpy(), scales[..., None], out=out.numpy())


def _floats(scale: Buffer) -> Float[np.ndarray, " n"]:
    return np.frombuffer(memoryview(scale), dtype="<f4")


def _tensor(data: Buffer, storage: pa.DataType) -> Tensor:
    """Bytes as a tensor without a copy. By DLPack, since torch warns of every read-only buffer that it is
    given directly."""
    num_values = memoryview(data).nbytes * 8 // storage.bit_width
    return torch.from_dlpack(pa.Array.from_buffers(storage, num_values, [None, pa.py_buffer(data)]))
