"""Targets as bytes."""

import dataclasses

import numpy as np
import pytest
import torch
import xxhash

from salt_distill.common.targets import codec


def layer_normed(b=3, n=5, d=16, seed=0):
    values = torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, d)
    return torch.nn.functional.layer_norm(values, (d,))


@pytest.mark.parametrize(("dtype", "relative_error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_floats_are_rounded_to_nearest(dtype, relative_error):
    targets = layer_normed()
    for row, encoded in enumerate(codec.encode(targets, dtype)):
        decoded = codec.decode(encoded, dtype, num_tokens=5, width=16)
        assert decoded.dtype == torch.float32
        assert ((decoded - targets[row]).abs() <= relative_error * targets[row].abs() + 1e-7).all()
        assert (decoded != targets[row]).any()  # it is rounded


def test_bfloat16_is_stored_as_the_upper_half_of_float32():
    target = torch.tensor([[[1.0, -2.5, 3.140625, 0.0]]])
    [encoded] = codec.encode(target, "bfloat16")
    upper = (target.numpy().reshape(-1).view(np.uint32) >> 16).astype(np.uint16)
    assert bytes(encoded.target) == upper.tobytes()


def test_int8_against_a_slow_reference():
    targets = layer_normed()
    for target, encoded in zip(targets.numpy(), codec.encode(targets, "int8"), strict=True):
        scales, values = (
            np.frombuffer(encoded.scale, "<f4"),
            np.frombuffer(encoded.target, np.int8).reshape(5, 16),
        )
        for token in range(5):
            scale = np.float32(np.abs(target[token]).max()) / np.float32(127)
            assert scales[token] == scale
            assert values[token].tolist() == [
                int(np.clip(np.rint(x / scale), -128, 127)) for x in target[token]
            ]
        decoded = codec.decode(encoded, "int8", num_tokens=5, width=16)
        assert np.array_equal(decoded.numpy(), values.astype(np.float32) * scales[:, None])
        assert np.abs(values).max(axis=1).tolist() == [127] * 5


def test_a_zero_token_has_scale_zero():
    targets = layer_normed()
    targets[1, 2] = 0
    encoded = codec.encode(targets, "int8")[1]
    assert np.frombuffer(encoded.scale, "<f4")[2] == 0
    assert (codec.decode(encoded, "int8", num_tokens=5, width=16)[2] == 0).all()


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_checksum_is_of_target_then_scale(dtype):
    [encoded] = codec.encode(layer_normed(b=1), dtype)
    assert encoded.checksum == xxhash.xxh3_64_intdigest(bytes(encoded.target) + bytes(encoded.scale or b""))
    assert encoded.num_bytes == codec.num_bytes(dtype, 5, 16)


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_one_flipped_bit_is_found(dtype):
    [encoded] = codec.encode(layer_normed(b=1), dtype)
    damaged = bytearray(encoded.target)
    damaged[7] ^= 1
    with pytest.raises(codec.CorruptTargetError, match="checksum"):
        codec.decode(dataclasses.replace(encoded, target=bytes(damaged)), dtype, num_tokens=5, width=16)


def test_a_cut_target_and_a_missing_scale_are_found():
    [encoded] = codec.encode(layer_normed(b=1), "int8")
    for broken in (
        dataclasses.replace(encoded, target=bytes(encoded.target)[:-1]),
        dataclasses.replace(encoded, scale=None),
    ):
        with pytest.raises(codec.CorruptTargetError, match="expected 80 and 20"):
            codec.decode(broken, "int8", num_tokens=5, width=16)


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_encoding_does_not_depend_on_the_batch(dtype):
    targets = layer_normed()
    together = codec.encode(targets, dtype)
    assert [together[row].checksum for row in range(3)] == [
        codec.encode(targets[row : row + 1], dtype)[0].checksum for row in range(3)
    ]
    assert len({encoded.checksum for encoded in together}) == 3


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_packed_targets_are_the_bytes_of_the_wire_and_the_values_of_decode(dtype):
    targets = layer_normed(b=3)
    targets[1, 2] = 0  # a token of zeros has scale 0
    packed = codec.pack(targets, dtype)
    assert packed.element_size() == (1 if dtype == "int8" else 2)
    filled = codec.empty_packed(3, 5, 16, dtype)
    for row, encoded in enumerate(codec.encode(targets, dtype)):
        codec.pack_into(filled[row], encoded, dtype)
        decoded = codec.decode(encoded, dtype, num_tokens=5, width=16)
        assert torch.equal(codec.widen(packed)[row], decoded)
        assert filled[row].nbytes == encoded.num_bytes
    assert torch.equal(filled.view(torch.uint8), packed.view(torch.uint8))
    hidden = torch.tensor([[0, 3], [2, 4], [1, 2]])[..., None]  # gathered first, widened then: the same
    gathered = codec.widen(packed.take_along_dim(hidden, dim=1))
    assert torch.equal(gathered, codec.widen(packed).take_along_dim(hidden, dim=1))


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_tokens_that_were_not_asked_for_are_zeros(dtype):
    [encoded] = codec.encode(layer_normed(b=1), dtype)
    token_idx = np.array([1, 4])
    row = torch.full_like(codec.empty_packed(1, 5, 16, dtype)[0], 7)
    codec.pack_into(row, codec.take_tokens(encoded, token_idx, num_tokens=5), dtype, token_idx)
    expected = codec.decode(encoded, dtype, num_tokens=5, width=16)
    expected[[0, 2, 3]] = 0
    assert torch.equal(codec.widen(row), expected)


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_some_tokens_of_a_target_are_the_same_values(dtype):
    [encoded] = codec.encode(layer_normed(b=1), dtype)
    whole = codec.decode(encoded, dtype, num_tokens=5, width=16)
    part = codec.decode(
        codec.take_tokens(encoded, np.array([1, 4]), num_tokens=5), dtype, num_tokens=2, width=16
    )
    assert torch.equal(part, whole[[1, 4]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_teacher_that_is_not_finite_is_refused(value):
    targets = layer_normed()
    targets[2, 4, 15] = value
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(targets, "float16")
