"""Targets as bytes: the rounding and layout that wire, cache and in-process teachers share (DESIGN section 4,
Target)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from typing_extensions import Buffer

from salt_distill.common.config import TargetDtype

TARGET_DTYPES: tuple[TargetDtype, ...] = ("float16", "bfloat16", "int8")

_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
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


def pack(targets: Float[Tensor, "b n d"], dtype: TargetDtype) -> Shaped[Tensor, "b n packed"]:
    """Targets rounded as on the wire, on the tensor's own device. Raises ValueError where one is not finite.

    Note [packed]: the values of a token, which ``widen`` makes float32 again. Of int8 the four bytes of the
    token's scale come after them, so that one tensor holds all: half or a quarter of float32's bytes, until a
    loss needs that.
    """
    # A NaN is the minimum and the maximum of what it is in.
    if not torch.stack(torch.aminmax(targets)).isfinite().all():
        raise ValueError(
            "got targets with values that are not finite, expected LayerNormed latents: the teacher's weights"
            " are damaged"
        )
    if dtype != "int8":
        return targets.to(_TYPES[dtype])
    scales = targets.abs().amax(-1, keepdim=True) / 127
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (targets / divisor).round().clamp(-128, 127).to(torch.int8)
    return torch.cat((values, scales.contiguous().view(torch.int8)), dim=-1)


def widen(packed: Shaped[Tensor, "*b packed"]) -> Float[Tensor, "*b d"]:
    """The targets in float32, as a student compares with them. See Note [packed]."""
    if packed.dtype != torch.int8:
        return packed.float()
    scales = packed[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return packed[..., :-_SCALE_BYTES].float() * scales


def empty_packed(
    num_clips: int, num_tokens: int, width: int, dtype: TargetDtype, **where: Any
) -> Shaped[Tensor, "b n packed"]:
    """Room for packed targets. ``where``: what ``torch.empty`` takes beside a shape and a type."""
    if dtype == "int8":
        width += _SCALE_BYTES
    return torch.empty(num_clips, num_tokens, width, dtype=_TYPES[dtype], **where)


def encode(targets: Float[Tensor, "b n d"], dtype: TargetDtype) -> list[EncodedTarget]:
    """Each row in ``dtype``, as bytes. Raises ValueError where a target is not finite."""
    packed = pack(targets, dtype).cpu()
    if dtype == "int8":
        values, scales = packed[..., :-_SCALE_BYTES].numpy(), packed[..., -_SCALE_BYTES:].numpy()
        return [_encoded(target, scale) for target, scale in zip(values, scales, strict=True)]
    return [_encoded(target, None) for target in packed.view(torch.uint16).numpy()]


def decode(
    encoded: EncodedTarget, dtype: TargetDtype, *, num_tokens: int, width: int
) -> Float[Tensor, "n d"]:
    """The target in float32, as a student uses it. Raises CorruptTargetError."""
    packed = empty_packed(1, num_tokens, width, dtype)
    pack_into(packed[0], encoded, dtype)
    return widen(packed[0])


def pack_into(
    out: Shaped[Tensor, "n packed"],
    encoded: EncodedTarget,
    dtype: TargetDtype,
    token_idx: Int[np.ndarray, " k"] | None = None,
) -> None:
    """Fills ``out``, a clip's row of a batch on the host, as the bytes are. Raises CorruptTargetError.

    ``token_idx``: the tokens that ``encoded`` is of; the others become zeros.
    """
    num_tokens, width = out.shape[0] if token_idx is None else len(token_idx), out.shape[1]
    if dtype == "int8":
        width -= _SCALE_BYTES
    verify(encoded, dtype, num_tokens=num_tokens, width=width)
    rows = out.view(torch.uint8).numpy()
    if token_idx is not None:
        rows[:] = 0
    tokens = slice(None) if token_idx is None else token_idx
    num_bytes = width * _BYTES_PER_VALUE[dtype]
    rows[tokens, :num_bytes] = np.frombuffer(memoryview(encoded.target), np.uint8).reshape(
        num_tokens, num_bytes
    )
    if encoded.scale is not None:
        rows[tokens, num_bytes:] = np.frombuffer(memoryview(encoded.scale), np.uint8).reshape(
            num_tokens, _SCALE_BYTES
        )


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
