"""Clients that mean harm: bodies that trickle or lie, streams built to exhaust memory, names that are
paths."""

import contextlib
import json
import os
import socket
import struct
import threading
import time

import pyarrow as pa
import pytest
from access_tools import ALICE, HEAD, JSON, OPERATOR, REPORT, bearer, raw, write_tokens
from service_tools import ARROW, Caller, clips_by_digest, wait_until
from teacher_tools import load_teacher, serving

from salt_distill.common.targets import wire


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path)


@pytest.fixture
def caller(teacher, tokens):
    with serving(teacher, tokens=tokens, lease_s=0.05) as (url, _):
        yield Caller(url)


def test_a_body_that_trickles(teacher, tokens):
    with serving(teacher, tokens=tokens, body_timeout_s=0.5) as (url, inside):
        more = f"Authorization: Bearer {ALICE}\r\nX-Salt-Run: alice\r\nContent-Length: 5000\r\n\r\n"
        head = f"{HEAD}{more}".encode()
        parts = Caller(url).parts
        with socket.create_connection((parts.hostname, parts.port), timeout=5) as slow:
            slow.sendall(head)
            ended = threading.Event()

            def trickle():
                with contextlib.suppress(OSError):
                    while not ended.wait(0.05):
                        slow.sendall(b"x")

            thread = threading.Thread(target=trickle)
            thread.start()
            started, answer = time.monotonic(), b""
            with contextlib.suppress(ConnectionError):
                while chunk := slow.recv(65536):
                    answer += chunk
            ended.set()
            thread.join()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body arrives too slowly" in answer
        assert time.monotonic() - started < 3
        wait_until(lambda: not inside.room._requests)  # its room is free again
        stranger, _ = raw(url, f"{HEAD}Content-Length: 5000\r\n\r\n".encode(), wait_s=0.3)
        assert stranger.startswith(b"HTTP/1.1 401 ")  # before its body


def test_a_body_that_lies_about_its_length(teacher, tokens):
    clips = clips_by_digest(1)
    body = b"".join(
        wire.write_request(
            "float16",
            [wire.RequestRow(clip_digest=digest, clip=clip.tobytes()) for digest, clip in clips.items()],
        )
    )
    with serving(teacher, tokens=tokens, body_timeout_s=0.3) as (url, inside):
        head = f"{HEAD}Authorization: Bearer {ALICE}\r\nX-Salt-Run: alice\r\nContent-Length: "
        for length in (len(body) + 1, 10 * len(body)):
            assert raw(url, f"{head}{length}\r\n\r\n".encode() + body, wait_s=3)[0].startswith(
                b"HTTP/1.1 408 "
            )
        shorter, _ = raw(url, f"{head}{len(body) - 100}\r\n\r\n".encode() + body, wait_s=1)
        assert shorter.split()[1] in (b"400", b"422")  # what is over is no request
        assert b"HTTP/1.1 200" not in shorter
        for length in (10**15, 2**70):
            assert raw(url, f"{head}{length}\r\n\r\n".encode() + body, wait_s=1)[0].split()[1] in (
                b"413",
                b"400",
            )
        for wrong in ("-5", "5, 6", "abc", ""):
            assert raw(url, f"{head}{wrong}\r\n\r\n".encode() + body, wait_s=1)[0].startswith(
                b"HTTP/1.1 400 "
            )
        both = f"{head}{len(body)}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + body
        assert raw(url, both, wait_s=1)[0].split()[1] in (b"400", b"413", b"408", b"422")
        assert inside.batcher.counters.clips_computed == 0
        assert Caller(url).statuses(list(clips), clips, run="alice", headers=bearer(ALICE)) == ["ok"]


def stream_of(schema, *batches, compression=None):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def bombs():
    """Streams that stand for far more memory than they have bytes, by name."""
    right = {"salt.protocol": "1", "salt.target_dtype": "float16"}
    digests, gigabyte = (
        pa.array([bytes(32)], pa.binary(32)),
        pa.array([b"\0" * 300_000_000], pa.large_binary()),
    )
    plain = pa.schema(
        [pa.field("clip_digest", pa.binary(32), nullable=False), pa.field("clip", pa.large_binary())], right
    )
    zeros = pa.record_batch([digests, gigabyte], schema=plain)
    small = stream_of(
        plain, pa.record_batch([digests, pa.array([b"x" * 100], pa.large_binary())], schema=plain)
    )
    yield "compressed buffers", stream_of(plain, zeros, compression="zstd")
    yield (
        "compressed buffers (lz4)",
        stream_of(plain, pa.record_batch([digests, gigabyte.slice(0, 1)], schema=plain), compression="lz4"),
    )
    words = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), gigabyte)
    other = pa.schema([plain.field(0), pa.field("clip", words.type)], right)
    yield (
        "a dictionary",
        stream_of(other, pa.record_batch([digests, words], schema=other), compression="zstd"),
    )
    nested = pa.large_binary()
    for _ in range(60):
        nested = pa.list_(nested)
    yield "deep nesting", stream_of(pa.schema([plain.field(0), pa.field("clip", nested)], right))
    yield (
        "many columns",
        stream_of(pa.schema([pa.field(f"c{number}", pa.int8()) for number in range(50_000)], right)),
    )
    yield "long metadata", stream_of(pa.schema(list(plain), {**right, "salt.note": "x" * 100_000}))
    empty = pa.record_batch([digests.slice(0, 0), gigabyte.slice(0, 0)], schema=plain)
    yield "many empty batches", stream_of(plain, *[empty] * 10_000)
    yield (
        "many rows",
        stream_of(
            plain,
            pa.record_batch(
                [pa.array([bytes(32)] * 50_000, pa.binary(32)), pa.nulls(50_000, pa.large_binary())],
                schema=plain,
            ),
        ),
    )
    for place in range(0, len(small) - 8, 4):  # every length and offset in turn, a terabyte or so
        yield f"a huge number at {place}", small[:place] + struct.pack("<q", 1 << 40) + small[place + 8 :]
        if place % 16 == 0:
            yield (
                f"the largest length at {place}",
                small[:place] + struct.pack("<i", (1 << 31) - 1) + small[place + 4 :],
            )


def test_arrow_streams_built_to_exhaust_memory(teacher, tokens):
    """In a process with little memory to spare: what Arrow believed, it could not have."""
    with serving(teacher, tokens=tokens) as (url, _):
        caller, statuses = Caller(url), set()
        named = {}
        for name, body in bombs():
            before = pa.total_allocated_bytes()
            peak_before = resident_bytes()
            status, _, answer = caller.send("POST", "/v1/targets", body, {**ARROW, **bearer(OPERATOR)})
            assert resident_bytes() - peak_before < 60_000_000 + 4 * len(body), name
            assert pa.total_allocated_bytes() - before < 50_000_000, name
            statuses.add(status)
            named[name] = (status, json.loads(answer)["error"] if status != 200 else "")
        assert statuses <= {200, 413, 422}, {
            name: value for name, value in named.items() if value[0] not in (200, 413, 422)
        }
        assert "compressed" in named["compressed buffers"][1]
        assert "compressed" in named["compressed buffers (lz4)"][1]
        assert "expected at most 65536" in named["many columns"][1]
        assert named["many empty batches"][0] == named["many rows"][0] == 413
        for name in ("a dictionary", "deep nesting", "long metadata"):
            assert named[name][0] == 422, named[name]
        clips = clips_by_digest(2)
        assert caller.statuses(list(clips), clips, headers=bearer(OPERATOR)) == ["ok"] * 2


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_names_that_are_paths(caller, teacher):
    for name in (
        "..",
        ".",
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        "a%00b",
        "a%0ab",
        "a/b",
        "a" * 65,
        "%F0%9F%98%80",
        "a b",
    ):
        status, _, _ = caller.send(
            "POST", f"/v1/runs/{name.replace(' ', '%20')}/progress", REPORT, {**JSON, **bearer(OPERATOR)}
        )
        assert status in (404, 405, 422), name
    for name in ("..", ".", "../../etc/passwd", "a/b", "a" * 65, ""):
        status, _ = caller.ask(list(clips_by_digest(1)), run=name, headers=bearer(OPERATOR))
        assert status == 422, name
    assert json.loads(caller.send("GET", "/v1/runs", headers=bearer(OPERATOR))[2]) == []
