"""Request and response bodies."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
import torch

from salt_distill.common.targets import codec, wire

DIGESTS = [bytes([number]) * 32 for number in range(4)]
METADATA = {"salt.protocol": "1", "salt.target_dtype": "float16"}
COLUMNS = {"clip_digest": pa.array(DIGESTS[:1], pa.binary(32)), "clip": pa.array([b"abc"], pa.large_binary())}


def body_of(columns, metadata=METADATA):
    """A request body as any Arrow library would write it."""
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_request_round_trip():
    rows = [
        wire.RequestRow(clip_digest=DIGESTS[0], clip=b"pixels"),
        wire.RequestRow(clip_digest=DIGESTS[1]),
        wire.RequestRow(clip_digest=DIGESTS[2], token_idx=np.array([0, 3, 9])),
    ]
    request = wire.read_request(b"".join(wire.write_request("int8", rows)))
    assert request.target_dtype == "int8"
    assert [row.clip_digest for row in request.rows] == DIGESTS[:3]
    assert [None if row.clip is None else bytes(row.clip) for row in request.rows] == [b"pixels", None, None]
    assert [None if row.token_idx is None else row.token_idx.tolist() for row in request.rows] == [
        None,
        None,
        [0, 3, 9],
    ]


def test_a_clip_is_not_copied_out_of_the_body():
    body = pa.py_buffer(
        b"".join(wire.write_request("int8", [wire.RequestRow(clip_digest=DIGESTS[0], clip=bytes(1000))]))
    )
    [row] = wire.read_request(body).rows
    assert body.address <= row.clip.address < body.address + body.size


def test_large_cells_are_pieces_of_a_body_and_small_ones_are_not():
    clips = [np.full(size, value, dtype=np.uint8) for value, size in enumerate((100_000, 10, 70_001, 10))]
    body = wire.write_request(
        "int8",
        [wire.RequestRow(clip_digest=DIGESTS[number], clip=clip.data) for number, clip in enumerate(clips)],
    )
    addresses = [np.frombuffer(piece, dtype=np.uint8).ctypes.data for piece in body]
    assert len(body) == 5
    assert [addresses[1], addresses[3]] == [clips[0].ctypes.data, clips[2].ctypes.data]  # where they were
    for row, clip in zip(wire.read_request(b"".join(body)).rows, clips, strict=True):
        assert bytes(row.clip or b"") == clip.tobytes()


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_response_round_trip(dtype):
    encoded = codec.encode(torch.randn(2, 5, 8), dtype)
    header = wire.ResponseHeader(
        target_dtype=dtype, fingerprint="f" * 64, compute={"batch_size": 4}, shape=(5, 8), leased=(2,)
    )
    rows = [
        wire.ResponseRow(clip_digest=DIGESTS[0], status="ok", encoded=encoded[0]),
        wire.ResponseRow(clip_digest=DIGESTS[1], status="ok", encoded=encoded[1]),
        wire.ResponseRow(clip_digest=DIGESTS[2], status="need_clip"),
        wire.ResponseRow(clip_digest=DIGESTS[3], status="bad_shape"),
    ]
    read_header, read_rows = wire.read_response(b"".join(wire.write_response(header, rows)))
    assert read_header == header
    assert [(row.clip_digest, row.status) for row in read_rows] == [
        (row.clip_digest, row.status) for row in rows
    ]
    for got, expected in zip(read_rows[:2], encoded, strict=True):
        assert torch.equal(
            *(codec.decode(one, dtype, num_tokens=5, width=8) for one in (got.encoded, expected))
        )
    assert read_rows[2].encoded is None


def test_a_response_is_plain_arrow():
    [encoded] = codec.encode(torch.ones(1, 2, 3), "int8")
    header = wire.ResponseHeader(target_dtype="int8", fingerprint="f", compute={}, shape=(2, 3))
    body = b"".join(
        wire.write_response(header, [wire.ResponseRow(clip_digest=DIGESTS[0], status="ok", encoded=encoded)])
    )
    table = pa.ipc.open_stream(body).read_all()
    names = {
        "clip_digest": pa.binary(32),
        "status": pa.string(),
        "target": pa.large_binary(),
        "scale": pa.large_binary(),
        "checksum": pa.uint64(),
    }
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == names
    assert table["target"].to_pylist() == [bytes([127] * 6)]
    assert table.schema.metadata[b"salt.shape"] == b"[2, 3]"


BROKEN = {
    "no stream": (b"not arrow at all", "no Arrow IPC stream"),
    "cut": (body_of(COLUMNS)[:-200], "no Arrow IPC stream"),
    "no rows": (
        body_of({"clip_digest": pa.array([], pa.binary(32)), "clip": pa.array([], pa.large_binary())}),
        "without rows",
    ),
    "missing column": (
        body_of({"clip_digest": COLUMNS["clip_digest"]}),
        "got the columns clip_digest, expected clip_digest, clip",
    ),
    "extra column": (
        body_of({**COLUMNS, "label": pa.array([1])}),
        "got the columns clip_digest, clip, label",
    ),
    "wrong type": (
        body_of({**COLUMNS, "clip": pa.array([b"abc"], pa.binary())}),
        "clip: got binary, expected large_binary",
    ),
    "short digest": (
        body_of({**COLUMNS, "clip_digest": pa.array([b"x" * 31], pa.binary(31))}),
        "expected fixed_size_binary",
    ),
    "null digest": (
        body_of({**COLUMNS, "clip_digest": pa.array([None], pa.binary(32))}),
        "without clip_digest",
    ),
    "no metadata": (body_of(COLUMNS, {}), "expected also salt.protocol"),
    "other protocol": (body_of(COLUMNS, {**METADATA, "salt.protocol": "2"}), "different versions"),
    "unknown metadata": (
        body_of(COLUMNS, {**METADATA, "salt.color": "red"}),
        "unknown schema metadata salt.color",
    ),
    "unknown dtype": (
        body_of(COLUMNS, {**METADATA, "salt.target_dtype": "float8"}),
        "expected one of float16, bfloat16, int8",
    ),
    "tokens twice": (
        body_of({**COLUMNS, "token_idx": pa.array([[1, 1]], pa.list_(pa.uint16()))}),
        "strictly ascending",
    ),
    "no tokens": (body_of({**COLUMNS, "token_idx": pa.array([[]], pa.list_(pa.uint16()))}), "empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_request_is_refused_with_got_and_expected(name):
    body, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        wire.read_request(body)


def test_offsets_that_point_outside_the_body_are_refused():
    body = bytearray(body_of(COLUMNS))
    place = body.index(np.array([0, 3], dtype="<i8").tobytes())
    body[place : place + 16] = np.array([0, 1 << 40], dtype="<i8").tobytes()
    with pytest.raises(ValueError, match="no Arrow IPC stream"):
        wire.read_request(body)


RECORDED = {
    "request": "5f8a12d8840af2f5ee6f14918cfda7ee3576fb7608cbea901ccebd25c6befc9e",
    "float16": "2841bcafb9a568da86259a75e6d2e6ff23fcfe00f22b192da923a398f4e3630b",
    "bfloat16": "3fb88e08fc00a912f22080c7673954b39938362f6a7bc8309cfe3732b5fe5ea0",
    "int8": "9a3d64bf7cf84c27ee5ac5e80311fca29f18650cb9b8f630f80486ec1093d5c3",
}
"""sha256 of bodies as the first version of the protocol wrote them."""


@pytest.mark.parametrize("kind", RECORDED)
def test_the_bytes_of_the_protocol_do_not_change(kind):
    numbers = np.random.default_rng(0 if kind == "request" else 1)
    if kind == "request":
        asked = ((3072, None), (0, np.array([1, 3, 7])), (100_000, np.array([0])))
        rows = [
            wire.RequestRow(
                clip_digest=numbers.bytes(32), clip=numbers.bytes(size) if size else None, token_idx=token_idx
            )
            for size, token_idx in asked
        ]
        body = wire.write_request("int8", rows)
    else:
        encoded = [
            target
            for shape in ((3, 8, 24), (1, 512, 96))
            for target in codec.encode(
                torch.from_numpy(numbers.standard_normal(shape).astype("float32")), kind
            )
        ]
        header = wire.ResponseHeader(
            target_dtype=kind,
            fingerprint=64 * "f",
            compute={"device": "cpu", "batch_size": 4, "compiled": False},
            shape=(8, 24),
            leased=(4,),
        )
        rows = [
            wire.ResponseRow(clip_digest=numbers.bytes(32), status="ok", encoded=target) for target in encoded
        ]
        rows.append(wire.ResponseRow(clip_digest=numbers.bytes(32), status="need_clip"))
        body = wire.write_response(header, rows)
    assert hashlib.sha256(b"".join(body)).hexdigest() == RECORDED[kind]
