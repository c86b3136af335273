"""The three sources of targets: the same bits, and what happens when a service misbehaves."""

import dataclasses
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from recovery_tools import protocol_client
from teacher_tools import VIEW, batch_of, load_teacher, random_clips, runs_on_board, serving
from train_tools import metrics_line

from salt_distill.common.config import ServiceClientConfig
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.views import view_facts
from salt_distill.common.targets import cache_file, codec
from salt_distill.common.targets.manifest import CacheSpec, FileListing, Manifest
from salt_distill.student_trainer.targets.client import (
    ServiceClient,
    TeacherMismatchError,
    require_same_teacher,
)
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.retry import TeacherUnavailableError
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.student_trainer.targets.stored_targets import StoredTargets, TargetMissError

CLIENT = ServiceClientConfig(request_clips=3, connections=2, timeout_s=20, retry_budget_s=20)
IMPATIENT = ServiceClientConfig(request_clips=3, connections=2, timeout_s=2, retry_budget_s=0.5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture
def open_source():
    """Makes sources that end with the test."""
    sources = []

    def keep(source):
        sources.append(source)
        return source

    yield keep
    for source in sources:
        source.close()


def write_cache(root, teacher, batch, dtype, **changes):
    spec = CacheSpec(
        teacher=teacher.spec,
        target_dtype=dtype,
        shape=(teacher.spec.num_tokens, teacher.spec.width),
        data_seed=0,
        views=2,
        view=view_facts(VIEW),
        decoder="decoder 1",
        index_hash="a" * 64,
        split="train",
    )
    spec = spec.model_copy(update=changes)
    rows = [
        cache_file.CacheRow(
            clip_digest=batch.digests[number],
            key=batch.keys[number],
            view=0,
            encoded=codec.encode(teacher.forward(batch.pixels[number : number + 1]), dtype)[0],
        )
        for number in range(len(batch.digests))
        if batch.good[number]
    ]
    name = cache_file.file_path(spec, 0, "train-000000.tar")
    num_rows = cache_file.write_file(root / name, spec, rows)
    Manifest(spec=spec, files={name: FileListing.of(root / name, num_rows)}).write(root)
    return root


def cached(path, dtype, **changes):
    mine = {"data": "none", "split": "train", "data_seed": 0, "view": VIEW, "decoder": "decoder 1"}
    return StoredTargets(path, dtype, **{**mine, **changes})


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_served_cached_and_local_targets_have_the_same_bits(teacher, tmp_path, open_source, dtype):
    pixels = random_clips(8)
    pixels[6] = pixels[1]  # a small data set has a clip twice in a batch
    batch = batch_of(pixels, bad=(4,))
    with serving(teacher) as (url, _):
        sources = {
            "service": ServiceTargets(url, dtype, CLIENT, "run-a"),
            "cache": cached(write_cache(tmp_path, teacher, batch, dtype), dtype),
            "in-process": LocalTargets(teacher, dtype),
        }
        results = {
            name: open_source(source).request(batch).result(timeout=30) for name, source in sources.items()
        }
        for name, source in sources.items():
            assert source.name == name
            assert source.spec == teacher.spec
            assert torch.equal(results[name], results["in-process"])
    result = results["in-process"]
    assert (result[4] == 0).all()
    assert torch.equal(result[6], result[1])
    for row in (0, 1, 2, 3, 5, 7):
        [encoded] = codec.encode(teacher.forward(pixels[row : row + 1]), dtype)
        assert torch.equal(
            codec.widen(result[row]),
            codec.decode(encoded, dtype, num_tokens=teacher.spec.num_tokens, width=teacher.spec.width),
        )


def test_the_client_of_the_protocols_page_gets_the_same_bits(teacher):
    """As it stands in docs/protocol.md."""
    targets = protocol_client()
    clips = random_clips(5)
    expected = codec.decode(
        codec.encode(teacher.forward(clips[:1]), "float16")[0],
        "float16",
        num_tokens=teacher.spec.num_tokens,
        width=teacher.spec.width,
    )
    with serving(teacher) as (url, inside):
        found = targets(url, [*clips, clips[0]])
        again = targets(url, clips)
        assert inside.metrics().clips_computed == 5
    assert torch.equal(torch.from_numpy(found[0].copy()).float(), expected)
    assert all(np.array_equal(one, other) for one, other in zip(found, [*again, again[0]], strict=True))


def test_two_students_at_once_upload_and_compute_each_clip_once(teacher, open_source):
    """Requests of different size cross: each student holds leases that the other one waits for."""
    batches = [batch_of(random_clips(12, seed)) for seed in range(6)]
    with serving(teacher, lease_s=20) as (url, inside):
        students = [
            open_source(
                ServiceTargets(url, "float16", CLIENT.model_copy(update={"request_clips": size}), name)
            )
            for name, size in (("a", 5), ("b", 4))
        ]
        started = time.monotonic()
        futures = [[student.request(batch) for batch in batches] for student in students]
        results = [[future.result(timeout=30) for future in row] for row in futures]
        assert time.monotonic() - started < 15  # shorter than a lease: nobody waited for one to end
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        metrics = inside.metrics()
        assert metrics.clips_computed == 72
        assert metrics.clips_served == 144
        assert metrics.coalesced + metrics.from_memory == 72
        assert sum(student.counters()["clips_up"] for student in students) == 72
        assert {run["id"]: run["clips_served"] for run in runs_on_board(url)} == {"a": 72, "b": 72}


def test_a_service_that_comes_back_is_waited_for(teacher, open_source):
    batch = batch_of(random_clips(2))
    with serving(teacher) as (url, _):
        source = open_source(ServiceTargets(url, "float16", CLIENT, "a"))
        first = source.request(batch).result(timeout=30)
    future = source.request(batch)
    time.sleep(0.3)
    assert not future.done()
    with serving(teacher, port=int(url.rsplit(":", 1)[1])):
        assert torch.equal(future.result(timeout=30), first)
    assert source.counters()["retries"] > 0


def test_a_service_that_stays_away_ends_the_run_with_a_typed_error(teacher, open_source):
    with serving(teacher) as (url, _):
        source = open_source(ServiceTargets(url, "float16", IMPATIENT, "a"))
    with pytest.raises(TeacherUnavailableError, match=r"failed for .*retry_budget_s=0\.5.*--resume"):
        source.request(batch_of(random_clips(2))).result(timeout=30)
    with pytest.raises(TeacherUnavailableError, match=r"no teacher answered at .*give its own URL"):
        ServiceTargets(url, "float16", IMPATIENT, "a")


def test_a_service_that_was_never_reached_is_asked_for_as_long_as_it_may_take_to_connect():
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
    since = time.monotonic()
    with pytest.raises(TeacherUnavailableError, match="no teacher answered"):
        ServiceTargets(url, "float16", ServiceClientConfig(connect_budget_s=0.3), "a")
    assert time.monotonic() - since < 5


def test_what_speaks_another_protocol_is_said_at_once(teacher):
    client = ServiceClientConfig(connect_budget_s=60)
    with serving(teacher) as (url, _), pytest.raises(ValueError, match="does not speak https"):
        ServiceTargets(url.replace("http", "https"), "float16", client, "a")
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as thread:

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(1000)

        greeting = thread.submit(greet)
        with pytest.raises(ValueError, match="does not speak http: SSH"):
            ServiceTargets(f"http://127.0.0.1:{other.getsockname()[1]}", "float16", client, "a")
        greeting.result()


class Faults:
    """Stands before the app and spoils the first answers of ``POST /v1/targets``."""

    def __init__(self, *faults):
        self.faults = list(faults)
        self.seen = []

    def __call__(self, app):
        async def faulty(scope, receive, send):
            if scope["type"] != "http" or scope["path"] != "/v1/targets" or not self.faults:
                return await app(scope, receive, send)
            fault = self.faults.pop(0)
            self.seen.append(time.monotonic())
            if isinstance(fault, int):
                await send(
                    {
                        "type": "http.response.start",
                        "status": fault,
                        "headers": [(b"retry-after", b"0.4"), (b"content-length", b"4")],
                    }
                )
                return await send({"type": "http.response.body", "body": b"busy"})

            async def spoil(message):
                if message["type"] == "http.response.body":
                    body = bytearray(message["body"])
                    message = {**message, "body": fault(body)}
                await send(message)

            return await app(scope, receive, spoil)

        return faulty


def garbage(body):
    return bytes(len(body))


@pytest.mark.parametrize("faults", [(503, 429), (garbage,), (500, 502, 504)])
def test_failures_are_retried_and_counted(teacher, open_source, faults):
    batch = batch_of(random_clips(2))
    between = Faults(*faults)
    with serving(teacher, around=between, lease_s=0.5) as (url, _):  # a lost answer costs its lease
        source = open_source(ServiceTargets(url, "float16", CLIENT, "a"))
        expected = open_source(LocalTargets(teacher, "float16")).request(batch).result()
        assert torch.equal(source.request(batch).result(timeout=30), expected)
        assert source.counters()["retries"] == len(faults)
    if faults[0] == 503:
        assert between.seen[1] - between.seen[0] >= 0.4  # Retry-After


def test_a_damaged_target_is_never_used(teacher, open_source):
    def flip_the_target(body):
        place = body.find(bytes(expected_encoded.target)[:64])
        assert place > 0
        body[place + 5] ^= 1
        return bytes(body)

    batch = batch_of(random_clips(1))
    [expected_encoded] = codec.encode(teacher.forward(batch.pixels), "float16")
    with serving(teacher, around=Faults(bytes, flip_the_target)) as (url, _):  # the first answer is need_clip
        source = open_source(ServiceTargets(url, "float16", CLIENT, "a"))
        result = source.request(batch).result(timeout=30)
        assert source.counters()["corrupt"] == 1
    assert torch.equal(
        codec.widen(result[0]), codec.decode(expected_encoded, "float16", num_tokens=8, width=24)
    )


def test_another_teacher_behind_the_same_url_stops_the_run(teacher, open_source, tmp_path):
    batch = batch_of(random_clips(2))
    with serving(teacher) as (url, _):
        source = open_source(ServiceTargets(url, "float16", CLIENT, "a"))
    other = load_teacher(tmp_path, seed=1)
    assert other.spec.fingerprint != teacher.spec.fingerprint
    with (
        serving(other, port=int(url.rsplit(":", 1)[1])),
        pytest.raises(TeacherMismatchError, match="another teacher"),
    ):
        source.request(batch).result(timeout=30)


def test_the_same_teacher_that_runs_otherwise_stops_the_run(teacher, open_source):
    class Otherwise:
        spec = dataclasses.replace(teacher.spec, compute={**teacher.spec.compute, "dtype": "bfloat16"})
        forward = staticmethod(teacher.forward)

    with serving(teacher) as (url, _):
        source = open_source(ServiceTargets(url, "float16", CLIENT, "a"))
    with (
        serving(Otherwise, port=int(url.rsplit(":", 1)[1])),
        pytest.raises(TeacherMismatchError, match="bfloat16"),
    ):
        source.request(batch_of(random_clips(2))).result(timeout=30)


def test_what_the_service_refuses_is_not_retried(teacher, open_source):
    with serving(teacher, max_request_bytes=4000) as (url, _):
        source = open_source(ServiceTargets(url, "float16", CLIENT, "a"))
        with pytest.raises(ValueError, match="413 the body is too large"):
            source.request(batch_of(random_clips(3))).result(timeout=30)
        assert source.counters()["retries"] == 0


def test_a_connection_that_the_server_closed_is_opened_again(teacher, open_source):
    with serving(teacher) as (url, _):
        source = open_source(
            ServiceTargets(url, "float16", CLIENT.model_copy(update={"connections": 1}), "a")
        )
        source.request(batch_of(random_clips(1))).result(timeout=30)
        for connection in source._client._connections:
            if connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
        source.request(batch_of(random_clips(1, seed=5))).result(timeout=30)
        assert source.counters()["reconnects"] == 1
        assert source.counters()["retries"] == 0


def test_closing_ends_a_wait(teacher, open_source):
    gate = threading.Event()

    class Stuck:
        spec = teacher.spec
        calls = 0

        def forward(self, clips):
            self.calls += 1
            if self.calls > 1:
                gate.wait(20)
            return teacher.forward(clips)

    with serving(Stuck()) as (url, inside):
        source = ServiceTargets(url, "float16", CLIENT, "a")
        future = source.request(batch_of(random_clips(1)))
        while not inside.batcher.counters.need_clip:
            time.sleep(0.01)
        time.sleep(0.1)
        started = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(source.close).result(timeout=5)
        assert time.monotonic() - started < 3
        assert isinstance(future.exception(timeout=1), ConnectionError)
        gate.set()


def test_progress_reaches_the_board_and_stops_no_run(teacher):
    line = {
        "step": 1,
        "slot": 8,
        "loss": 0.25,
        "lr": 0.1,
        "flops": 1e12,
        "teacher_wait_ms": 2.5,
        "clips_per_s": 30.0,
    }
    with serving(teacher) as (url, _):
        source = ServiceTargets(url, "float16", CLIENT, "run a")
        source.report(metrics_line(**line))
        source.report(metrics_line(**line | {"step": -1}))
        source.close()
        assert source.counters()["progress_failures"] == 1
        [run] = runs_on_board(url)
        assert (run["id"], run["progress"]["loss"], run["progress"]["step"]) == ("run_a", 0.25, 1)


def test_a_run_goes_on_only_with_the_teacher_it_began_with(teacher, open_source):
    source = open_source(LocalTargets(teacher, "float16"))
    require_same_teacher(source.spec, dataclasses.replace(teacher.spec, name="the same in another folder"))
    for change in ({"fingerprint": "0" * 64}, {"compute": {**teacher.spec.compute, "batch_size": 9}}):
        with pytest.raises(TeacherMismatchError, match="start a new run"):
            require_same_teacher(source.spec, dataclasses.replace(teacher.spec, **change))


def test_a_wrong_url_is_refused_before_any_request():
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        ServiceClient("localhost:8000", CLIENT, "a")


def test_a_miss_shows_both_sides(teacher, tmp_path, open_source):
    batch = batch_of(random_clips(2))
    write_cache(tmp_path, teacher, batch, "float16")
    source = open_source(cached(tmp_path, "float16", data_seed=7))
    assert source.views == 2
    source.request(batch).result()
    with pytest.raises(
        TargetMissError,
        match=r"sample source/0.*Different: data_seed: here 7, in the cache 0\. Equal: view: .*decoder 1",
    ):
        source.request(batch_of(random_clips(1, seed=9))).result()


def test_a_miss_in_a_cache_of_another_data_set_names_both(teacher, tmp_path, open_source, shards):
    write_cache(tmp_path, teacher, batch_of(random_clips(1)), "float16", index_hash="f" * 64)
    source = open_source(cached(tmp_path, "float16", data=str(shards)))
    mine = open_dataset(shards).index_hash
    with pytest.raises(
        TargetMissError,
        match=rf"Different: data set: here {shards} with index hash {mine}, in the cache one with ffff",
    ):
        source.request(batch_of(random_clips(1, seed=9))).result()


def test_a_miss_in_a_cache_of_other_crops_says_so(teacher, tmp_path, open_source):
    write_cache(tmp_path, teacher, batch_of(random_clips(1)), "float16", view=VIEW.model_dump(mode="json"))
    with pytest.raises(
        TargetMissError, match=r"Precompute again: .* view version 2, .* than in the cache's, 1"
    ):
        open_source(cached(tmp_path, "float16")).request(batch_of(random_clips(1, seed=9))).result()


def test_a_damaged_cache_is_refused(teacher, tmp_path, open_source):
    batch = batch_of(random_clips(2))
    write_cache(tmp_path, teacher, batch, "int8")
    [path] = tmp_path.rglob("*.arrow")
    data = bytearray(path.read_bytes())
    [encoded] = codec.encode(teacher.forward(batch.pixels[1:]), "int8")
    data[data.index(bytes(encoded.target))] ^= 1
    path.write_bytes(data)
    with pytest.raises(codec.CorruptTargetError, match="sample source/1, view 0"):
        open_source(cached(tmp_path, "int8")).request(batch).result()


@pytest.mark.parametrize("what", ["target", "offset"])
def test_a_cache_that_is_damaged_while_it_is_read_is_refused(what, teacher, tmp_path, open_source):
    batch = batch_of(random_clips(3))
    write_cache(tmp_path, teacher, batch, "float16")
    [path] = tmp_path.rglob("*.arrow")
    encoded = [codec.encode(teacher.forward(batch.pixels[row : row + 1]), "float16")[0] for row in range(3)]
    ends = np.cumsum([0] + [one.num_bytes for one in encoded])
    part = {"target": bytes(encoded[2].target), "offset": ends.astype("<i8").tobytes()}[what]
    place = path.read_bytes().index(part) + {"target": len(part) - 1, "offset": 8 * 3 + 1}[what]
    source = open_source(cached(tmp_path, "float16"))
    if what == "target":  # offsets are read once
        source.request(batch).result()
    with path.open("r+b") as file:  # in place: the source has the file open
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(codec.CorruptTargetError, match=r"sample source/2, view 0: got .*, expected"):
        source.request(batch).result()
    source.request(batch_of(batch.pixels[:2])).result()  # the others are whole


def test_a_cache_of_another_rounding_is_refused(teacher, tmp_path):
    write_cache(tmp_path, teacher, batch_of(random_clips(1)), "int8")
    with pytest.raises(ValueError, match="holds int8 targets, expected float16"):
        cached(tmp_path, "float16")
