"""Bodies of ``POST /v1/targets``: Arrow IPC streams (DESIGN section 4, HTTP)."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from pydantic import TypeAdapter
from typing_extensions import Buffer

from salt_distill.common.config import TargetDtype
from salt_distill.common.protocol import ARROW_TYPE, PROTOCOL, ROW_STATUSES, RowStatus
from salt_distill.common.targets.cells import cell, column_of
from salt_distill.common.targets.codec import TARGET_DTYPES, EncodedTarget
from salt_distill.common.targets.messages import TooManyRowsError, check_stream

DIGEST_BYTES = 32

Body = list[memoryview | bytearray]
"""A body in pieces, sent one after the other: clips and targets stay where they are."""
_PIECE_BYTES = 1 << 16
"""In a request: least size of a cell that is worth a piece of its own."""
_TARGET_PIECE_BYTES = 1 << 10
"""In an answer: thousands of rows of one small target are views of it."""
_ROW_BYTES, _STREAM_BYTES = 4096, 1 << 16
"""What Arrow adds to a target and to a body, at most."""

_CLIP_DIGEST = pa.field("clip_digest", pa.binary(DIGEST_BYTES), nullable=False)
_CLIP = pa.field("clip", pa.large_binary())
_TOKEN_IDX = pa.field("token_idx", pa.list_(pa.uint16()))
_RESPONSE_FIELDS = (
    _CLIP_DIGEST,
    pa.field("status", pa.string(), nullable=False),
    pa.field("target", pa.large_binary()),
    pa.field("scale", pa.large_binary()),
    pa.field("checksum", pa.uint64(), nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """One clip that a client wants the target of."""

    clip_digest: bytes
    clip: Buffer | None = None
    """The clip's uint8 bytes, or None: "do you have it?"."""
    token_idx: Int[np.ndarray, " k"] | None = None
    """Only these tokens, strictly ascending; None: all."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A parsed request body."""

    target_dtype: TargetDtype
    rows: list[RequestRow]


@dataclass(frozen=True, kw_only=True)
class ResponseRow:
    """The answer to one request row; rows may come in any order."""

    clip_digest: bytes
    status: RowStatus
    encoded: EncodedTarget | None = None
    """Present exactly where the status is ok."""


@dataclass(frozen=True, kw_only=True)
class ResponseHeader:
    """What holds for every row of a response: its schema metadata, each key behind ``salt.``."""

    target_dtype: TargetDtype
    fingerprint: str
    """The teacher's."""
    compute: dict[str, str | int | bool]
    """How the teacher ran."""
    shape: tuple[int, int]
    """(n, d) of a whole target; a row with ``token_idx`` has as many tokens as it asked for."""
    leased: tuple[int, ...] = ()
    """Rows whose ``need_clip`` means: the clip is on its way already, ask again without bytes."""


# Not json.loads, which deep JSON ends with a RecursionError; these raise ValueError.
_COMPUTE = TypeAdapter(dict[str, str | int | bool])
_SHAPE, _LEASED = TypeAdapter(tuple[int, int]), TypeAdapter(tuple[int, ...])


def write_request(target_dtype: TargetDtype, rows: Sequence[RequestRow]) -> Body:
    """A request body. The column ``token_idx`` is there only if a row has one."""
    fields = [_CLIP_DIGEST, _CLIP]
    if any(row.token_idx is not None for row in rows):
        fields.append(_TOKEN_IDX)
    schema = pa.schema(fields, metadata={"salt.protocol": PROTOCOL, "salt.target_dtype": target_dtype})
    return _write_stream(schema, (_request_columns(row, len(fields) == 3) for row in rows))


def read_request(body: Buffer, *, max_rows: int | None = None, num_tokens: int | None = None) -> Request:
    """A request body, parsed; clips stay where they are in it. ``num_tokens``: of the teacher's targets.
    Raises ValueError with got and expected, TooManyRowsError."""
    schema, batches = _read_stream(body, _request_fields, max_rows)
    has_token_idx = "token_idx" in schema.names
    metadata = _metadata(schema, required=("protocol", "target_dtype"))
    dtype = _target_dtype(metadata)
    rows = []
    for batch in batches:
        token_lists = batch.column("token_idx") if has_token_idx else [None] * len(batch)
        for row_idx, (digest, token_idx) in enumerate(
            zip(batch.column("clip_digest"), token_lists, strict=True)
        ):
            clip = cell(batch.column("clip"), row_idx)
            rows.append(
                RequestRow(
                    clip_digest=_digest(digest), clip=clip, token_idx=_token_idx(token_idx, num_tokens)
                )
            )
    if not rows:
        raise ValueError("got a request without rows, expected at least one clip_digest")
    return Request(target_dtype=dtype, rows=rows)


def write_response(header: ResponseHeader, rows: Sequence[ResponseRow]) -> Body:
    """A response body."""
    metadata = {
        "salt.protocol": PROTOCOL,
        "salt.target_dtype": header.target_dtype,
        "salt.fingerprint": header.fingerprint,
        "salt.compute": json.dumps(header.compute, sort_keys=True),
        "salt.shape": json.dumps(header.shape),
        "salt.leased": json.dumps(header.leased),
    }
    return _write_stream(
        pa.schema(_RESPONSE_FIELDS, metadata=metadata),
        (_response_columns(row) for row in rows),
        piece_bytes=_TARGET_PIECE_BYTES,
    )


def max_response_bytes(num_rows: int, target_bytes: int) -> int:
    """How long an answer can be whose targets have at most so many bytes each."""
    return num_rows * (target_bytes + _ROW_BYTES) + _STREAM_BYTES


def read_response(body: Buffer) -> tuple[ResponseHeader, list[ResponseRow]]:
    """A response body, parsed; targets stay where they are in it, checksums unchecked. Raises ValueError with
    got and expected."""
    schema, batches = _read_stream(body, lambda schema: _RESPONSE_FIELDS)
    metadata = _metadata(
        schema, required=("protocol", "target_dtype", "fingerprint", "compute", "shape", "leased")
    )
    header = ResponseHeader(
        target_dtype=_target_dtype(metadata),
        fingerprint=metadata["fingerprint"],
        compute=_COMPUTE.validate_json(metadata["compute"]),
        shape=_SHAPE.validate_json(metadata["shape"]),
        leased=_LEASED.validate_json(metadata["leased"]),
    )
    rows = [_response_row(batch, row_idx) for batch in batches for row_idx in range(len(batch))]
    return header, rows


def _request_fields(schema: pa.Schema) -> Sequence[pa.Field]:
    return (_CLIP_DIGEST, _CLIP, _TOKEN_IDX) if "token_idx" in schema.names else (_CLIP_DIGEST, _CLIP)


def _request_columns(row: RequestRow, with_token_idx: bool) -> list[pa.Array]:
    columns = [pa.array([row.clip_digest], _CLIP_DIGEST.type), column_of(row.clip)]
    if with_token_idx:
        columns.append(pa.array([row.token_idx], _TOKEN_IDX.type))
    return columns


def _response_columns(row: ResponseRow) -> list[pa.Array]:
    encoded = row.encoded
    return [
        pa.array([row.clip_digest], _CLIP_DIGEST.type),
        pa.array([row.status], pa.string()),
        column_of(None if encoded is None else encoded.target),
        column_of(None if encoded is None else encoded.scale),
        pa.array([0 if encoded is None else encoded.checksum], pa.uint64()),
    ]


def _response_row(batch: pa.RecordBatch, row_idx: int) -> ResponseRow:
    digest, status, checksum = (batch.column(name)[row_idx] for name in ("clip_digest", "status", "checksum"))
    target, scale = (cell(batch.column(name), row_idx) for name in ("target", "scale"))
    name = status.as_py()
    if name not in ROW_STATUSES:
        raise ValueError(f"got a row with status {name!r}, expected one of {', '.join(ROW_STATUSES)}")
    if (name == "ok") == (target is None):
        raise ValueError(
            f"got a row with status {name!r} and {'no' if target is None else 'a'} target, expected one"
            " exactly where it is ok"
        )
    encoded = None if target is None else EncodedTarget(target=target, scale=scale, checksum=checksum.as_py())
    return ResponseRow(clip_digest=_digest(digest), status=name, encoded=encoded)


def _write_stream(
    schema: pa.Schema, rows: Iterable[list[pa.Array]], *, piece_bytes: int = _PIECE_BYTES
) -> Body:
    """One record batch a row, so that a megabyte cell is copied into no column."""
    sink = _Pieces(piece_bytes)
    with pa.ipc.new_stream(sink, schema) as writer:
        for columns in rows:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return sink.body


class _Pieces:
    """A file that keeps what Arrow writes: a cell of megabytes where it is, and what lies between two of them
    in one piece."""

    closed = False

    def __init__(self, piece_bytes: int) -> None:
        self.body: Body = []
        self._piece_bytes = piece_bytes

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if len(view) >= self._piece_bytes:
            self.body.append(view)
        elif self.body and isinstance(self.body[-1], bytearray):
            self.body[-1] += view
        else:
            self.body.append(bytearray(view))

    def flush(self) -> None:
        """Nothing waits."""


def _read_stream(
    body: Buffer, fields_of: Callable[[pa.Schema], Sequence[pa.Field]], max_rows: int | None = None
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches. Whatever they declare, they take no more memory than the body has bytes, and an
    object for each batch."""
    try:
        check_stream(pa.py_buffer(body), max_batches=max_rows)
        reader = pa.ipc.open_stream(pa.py_buffer(body))
        _check_fields(reader.schema, fields_of(reader.schema))
        batches = list(reader)
        if max_rows is not None and (num_rows := sum(len(batch) for batch in batches)) > max_rows:
            raise TooManyRowsError(f"{num_rows} rows")
        for batch in batches:
            batch.validate(full=True)  # offsets that point outside the body
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"got {memoryview(body).nbytes} bytes that are no Arrow IPC stream ({error}), expected"
            f" {ARROW_TYPE}"
        ) from error
    return reader.schema, iter(batches)


def _check_fields(schema: pa.Schema, expected: Sequence[pa.Field]) -> None:
    got = {field.name: field for field in schema}
    if len(got) != len(schema) or set(got) != {field.name for field in expected}:
        raise ValueError(
            f"got the columns {', '.join(schema.names)}, expected"
            f" {', '.join(field.name for field in expected)}"
        )
    for field in expected:
        if got[field.name].type != field.type:
            raise ValueError(f"column {field.name}: got {got[field.name].type}, expected {field.type}")


def _metadata(schema: pa.Schema, *, required: Sequence[str]) -> dict[str, str]:
    texts = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    salt = {key.removeprefix("salt."): value for key, value in texts.items() if key.startswith("salt.")}
    if missing := [key for key in required if key not in salt]:
        raise ValueError(f"got the schema metadata {sorted(texts)}, expected also salt.{missing[0]}")
    if unknown := [key for key in salt if key not in required]:
        raise ValueError(
            f"got the unknown schema metadata salt.{unknown[0]}, expected only"
            f" {', '.join('salt.' + key for key in required)}"
        )
    if salt["protocol"] != PROTOCOL:
        raise ValueError(
            f"got salt.protocol {salt['protocol']!r}, expected {PROTOCOL!r}: client and server are of"
            " different versions"
        )
    return salt


def _target_dtype(metadata: dict[str, str]) -> TargetDtype:
    for dtype in TARGET_DTYPES:
        if metadata["target_dtype"] == dtype:
            return dtype
    raise ValueError(
        f"got salt.target_dtype {metadata['target_dtype']!r}, expected one of {', '.join(TARGET_DTYPES)}"
    )


def _digest(scalar: pa.Scalar) -> bytes:
    if not scalar.is_valid:
        raise ValueError(f"got a row without clip_digest, expected {DIGEST_BYTES} bytes in every row")
    return scalar.as_py()


def _token_idx(scalar: pa.Scalar | None, num_tokens: int | None) -> np.ndarray | None:
    if scalar is None or not scalar.is_valid:
        return None
    values = scalar.values
    if values.null_count or len(values) == 0:
        raise ValueError(
            "got a token_idx that is empty or holds nulls, expected at least one token, or null for all of"
            " them"
        )
    if num_tokens is not None and len(values) > num_tokens:  # before a copy of it is made
        raise ValueError(f"got {len(values)} token_idx, expected at most the teacher's {num_tokens}")
    token_idx = values.to_numpy().astype(np.int64)
    if num_tokens is not None and token_idx[-1] >= num_tokens:
        raise ValueError(
            f"got token_idx up to {token_idx[-1]}, expected less than the teacher's {num_tokens}"
        )
    if (np.diff(token_idx) <= 0).any():
        raise ValueError(f"got token_idx {token_idx[:8].tolist()}..., expected strictly ascending tokens")
    return token_idx
