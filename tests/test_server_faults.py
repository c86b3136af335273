"""What goes wrong between client and service, on the plain ASGI app: never a 5xx, never a wrong target, and
the next request is served."""

import json

import numpy as np
import pyarrow as pa
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from service_tools import ARROW, Caller, clips_by_digest
from teacher_tools import load_teacher, serving

from salt_distill.common.protocol import ARROW_TYPE
from salt_distill.common.targets import codec, wire


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture(scope="module")
def caller(teacher):
    with serving(teacher, max_request_bytes=100_000, lease_s=0.05) as (url, _):
        yield Caller(url)


@pytest.fixture
def expected(teacher):
    """Each clip's checksum, by its digest."""
    clips = clips_by_digest(4)
    return {
        digest: codec.encode(teacher.forward(clip[None]), "float16")[0].checksum
        for digest, clip in clips.items()
    }


def body_of(clips):
    return b"".join(
        wire.write_request(
            "float16", [wire.RequestRow(clip_digest=digest, clip=clip.tobytes()) for digest, clip in clips]
        )
    )


def test_corrupt_and_truncated_bodies(caller, expected):
    clips = clips_by_digest(4)
    body = body_of(clips.items())
    random = np.random.default_rng(0)
    damaged = [body[: random.integers(len(body))] for _ in range(30)]
    for _ in range(120):
        flipped = bytearray(body)
        for place in random.integers(0, len(body), 3):
            flipped[place] ^= 1 << random.integers(8)
        damaged.append(bytes(flipped))
    seen = set()
    for sent in damaged:
        status, _, answer = caller.send("POST", "/v1/targets", sent, ARROW)
        seen.add(status)
        if status == 200:
            for row in wire.read_response(answer)[1]:
                assert row.status in ("ok", "bad_digest", "bad_shape", "need_clip")
                assert row.encoded is None or row.encoded.checksum == expected[row.clip_digest]
        else:
            assert set(json.loads(answer)) == {"error", "expected", "got", "hint"}
    assert seen == {200, 422}
    assert caller.statuses(list(clips), clips) == ["ok"] * 4


def test_a_body_that_is_shorter_than_it_says(caller):
    clips = clips_by_digest(1)
    with pytest.raises(TimeoutError):
        caller.send(
            "POST", "/v1/targets", body_of(clips.items()), {**ARROW, "Content-Length": "90000"}, timeout=0.3
        )
    assert caller.statuses(list(clips), clips) == ["ok"]


def test_bodies_that_are_not_what_the_protocol_says(caller):
    digest = pa.array([bytes(32)], pa.binary(32))
    right = {"salt.protocol": "1", "salt.target_dtype": "float16"}
    cases = [
        ({"clip_digest": digest}, right),
        ({"clip_digest": digest, "clip": pa.array([b"x"], pa.binary())}, right),
        ({"clip_digest": pa.array([b"x"]), "clip": pa.array([b"x"], pa.large_binary())}, right),
        (
            {"clip_digest": pa.array([None], pa.binary(32)), "clip": pa.array([b"x"], pa.large_binary())},
            right,
        ),
        (
            {"clip_digest": digest, "clip": pa.array([b"x"], pa.large_binary())},
            {**right, "salt.protocol": "2"},
        ),
        (
            {"clip_digest": digest, "clip": pa.array([b"x"], pa.large_binary())},
            {**right, "salt.target_dtype": "float64"},
        ),
        (
            {"clip_digest": digest, "clip": pa.array([b"x"], pa.large_binary())},
            {**right, "salt.colour": "blue"},
        ),
        ({"clip_digest": digest, "clip": pa.array([b"x"], pa.large_binary())}, {}),
    ]
    for columns, metadata in cases:
        table = pa.table(columns).replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        status, _, answer = caller.send("POST", "/v1/targets", sink.getvalue().to_pybytes(), ARROW)
        assert (status, set(json.loads(answer))) == (422, {"error", "expected", "got", "hint"}), (
            columns,
            metadata,
        )


def test_an_oversized_body(caller):
    status, _, answer = caller.send("POST", "/v1/targets", bytes(100_001), ARROW)
    assert (status, json.loads(answer)["got"]) == (413, "100001 bytes")


def test_duplicated_and_reordered_rows(caller, expected):
    clips = clips_by_digest(4)
    before = caller.counters()["clips_computed"]
    order = [*clips, *reversed(clips), *clips]
    _, rows = caller.targets(order, clips)
    assert [row.clip_digest for row in rows] == order
    assert [row.encoded.checksum for row in rows] == [expected[digest] for digest in order]
    assert caller.counters()["clips_computed"] - before <= 4


def test_no_request_that_the_api_describes_is_answered_with_a_5xx(teacher):
    with serving(teacher, lease_s=0.01) as (url, _):
        statuses = fuzz(schemathesis.openapi.from_url(f"{url}/openapi.json"))
    assert {200, 422} <= statuses
    assert max(statuses) < 500


schemathesis.serializer.alias(ARROW_TYPE, "application/octet-stream")


def fuzz(schema):
    """Calls every operation with what its schema allows, and with what it does not; the statuses."""
    statuses = set()
    for operation in schema.get_all_operations():
        if operation.ok().path in ("/v1/drain", "/v1/stop"):  # from then on 503 is right
            continue
        has_wrong_bodies = operation.ok().path.endswith("/progress")  # the others take nothing, or any bytes
        for mode in list(GenerationMode) if has_wrong_bodies else [GenerationMode.POSITIVE]:

            @settings(
                max_examples=25,
                deadline=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def call(case):
                statuses.add(case.call(timeout=20).status_code)

            call()
    return statuses
