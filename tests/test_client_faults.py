"""A student whose teacher service misbehaves: it learns what an undisturbed one does, or stops with the right
sentence."""

import contextlib
import functools
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import fault_tools as faults
import pytest
import torch
from fault_tools import linked
from student_tools import CLIENT, VIEW, open_source, run_of, train
from teacher_tools import BATCH_SIZE, load_teacher, save_teacher, serving
from train_tools import CPU, RandomClips, small_run

from salt_distill.common.config import ServiceClientConfig, StudentRun
from salt_distill.student_trainer.loop import Worker, train_on
from salt_distill.student_trainer.ranks import Ranks
from salt_distill.student_trainer.targets.client import ServiceClient, TeacherMismatchError
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.retry import RetryableError, TeacherUnavailableError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture(scope="module")
def undisturbed(teacher, tmp_path_factory):
    """Losses by number of steps, from targets of this process."""
    torch.set_num_threads(1)

    @functools.cache
    def losses(steps: int) -> list[float]:
        config = run_of(tmp_path_factory.mktemp("undisturbed") / "run", "http://127.0.0.1:1", steps=steps)
        with closing(LocalTargets(teacher, config.target_dtype)) as source:
            return train(config, source)

    return losses


RECOVERED = {
    "dropped": faults.dropped,
    "truncated": faults.truncated,
    "announced-too-long": faults.announced_too_long,
    "too-long": faults.too_long,
    "first-bit": faults.flipped(0.0),
    "bit-in-a-target": faults.flipped(0.8),
    "zeroed": faults.zeroed,
    "429": faults.busy,
    "slow": faults.slow(0.7),
    "duplicated-rows": faults.duplicated,
    "lacking-row": faults.lacking,
    "other-digest": faults.other_digest,
    "half-a-target": faults.half_a_target,
}


@pytest.mark.parametrize("fault", RECOVERED.values(), ids=RECOVERED)
def test_a_damaged_answer_changes_no_loss(fault, teacher, undisturbed, tmp_path):
    with serving(teacher, lease_s=0.1) as (url, _), linked(url) as link:  # a lost answer costs its leases
        link.fault, link.every = fault, 11
        config = run_of(
            tmp_path / "run", link.url, client={"timeout_s": 0.5} if fault is RECOVERED["slow"] else {}
        )
        with closing(open_source(config, run="a")) as source:
            assert train(config, source) == undisturbed(6)
            counters = source.counters()
            assert counters["retries"] + counters["reconnects"] > 1
            assert link.num_spoilt > 2


def test_an_answer_that_drips_is_late_though_bytes_keep_coming():
    def drip() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8000000\r\n\r\n")
            with contextlib.suppress(OSError):  # the client has left
                for _ in range(8):
                    connection.sendall(bytes(1_000_000))
                    time.sleep(0.3)

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(drip)
        config = ServiceClientConfig(timeout_s=0.5, retry_budget_s=0.01)
        client = ServiceClient(f"http://127.0.0.1:{server.getsockname()[1]}", config, "a")
        with pytest.raises(
            RetryableError, match=r"got \d+ bytes in the time for a whole answer, client\.timeout_s"
        ):
            client.targets([], "0" * 64, max_bytes=10_000_000)


def test_rows_in_another_order_need_no_retry(teacher, undisturbed, tmp_path):
    with serving(teacher) as (url, _), linked(url) as link:
        link.fault = faults.reordered
        config = run_of(tmp_path / "run", link.url)
        with closing(open_source(config, run="a")) as source:
            assert train(config, source) == undisturbed(6)
            assert source.counters()["retries"] == 0
        assert link.num_spoilt > 20


def test_targets_of_another_shape_stop_the_run(teacher, tmp_path):
    with serving(teacher) as (url, _), linked(url) as link:
        link.fault, link.every = faults.other_shape, 6
        config = run_of(tmp_path / "run", link.url)
        with (
            closing(open_source(config, run="a")) as source,
            pytest.raises(ValueError, match=r"got float16 targets of \(8, 25\), expected"),
        ):
            train(config, source)


def test_another_teacher_that_joins_stops_the_run(teacher, tmp_path):
    other = load_teacher(tmp_path, seed=1)
    with serving(teacher) as (url, _), serving(other) as (other_url, _), linked(url) as link:

        def join(head: bytes, body: bytes) -> bytes:
            link.target = other_url
            return head + body

        link.fault, link.every = join, 6
        config = run_of(tmp_path / "run", link.url)
        with (
            closing(open_source(config, run="a")) as source,
            pytest.raises(TeacherMismatchError, match=r"409 another teacher .*start a new run"),
        ):
            train(config, source)


def goes_away(link, until) -> faults.Fault:
    """A fault after which the service cannot be reached while ``until()`` is false."""

    def go(head: bytes, body: bytes) -> None:
        link.fault, link.is_down = None, lambda: not until()

    return go


def after(seconds: float):
    """Whether so much time has passed since the first call."""
    since: list[float] = []

    def passed() -> bool:
        since.append(time.monotonic())
        return since[-1] - since[0] > seconds

    return passed


def outage(
    url: str, tmp_path: Path, seconds: float, expected: list[float], **values
) -> dict[str, int | float]:
    """Counters of a run whose service is away for a while, after a check of its losses."""
    with linked(url) as link:
        link.fault, link.every = goes_away(link, after(seconds)), 8
        config = run_of(tmp_path / "run", link.url, **values)
        with closing(open_source(config, run="a")) as source:
            assert train(config, source) == expected
            return source.counters()


def test_a_service_that_comes_back_in_time_is_waited_for(teacher, undisturbed, tmp_path):
    with serving(teacher, lease_s=0.3) as (url, _):
        counters = outage(url, tmp_path, 0.7, undisturbed(6))
    assert (counters["retries"] > 0, counters["teacher_losses"]) == (True, 0)


@pytest.mark.faults
def test_a_service_that_is_gone_for_twenty_seconds_is_waited_for(teacher, undisturbed, tmp_path):
    with serving(teacher, lease_s=0.3) as (url, _):
        assert outage(url, tmp_path, 20, undisturbed(6), client={"retry_budget_s": 60})["retries"] > 0


def test_wait_outlasts_the_budget_and_says_since_when(teacher, undisturbed, tmp_path, caplog):
    with serving(teacher, lease_s=0.3) as (url, _):
        counters = outage(
            url, tmp_path, 1.0, undisturbed(6), client={"retry_budget_s": 0.1}, on_teacher_loss="wait"
        )
    assert counters["teacher_losses"] == 0
    assert any("it fails since" in record.getMessage() for record in caplog.records)


def test_fail_stops_with_a_sentence(teacher, tmp_path):
    with (
        serving(teacher) as (url, _),
        pytest.raises(TeacherUnavailableError, match=r"failed for .*retry_budget_s=0\.3.*--resume"),
    ):
        outage(url, tmp_path, 60, [], client={"retry_budget_s": 0.3})


def test_local_takes_over_and_hands_back(teacher, undisturbed, tmp_path):
    ckpt = save_teacher(tmp_path / "teacher")
    with serving(teacher, lease_s=0.3) as (url, _), linked(url) as link:
        config = run_of(
            tmp_path / "run",
            link.url,
            steps=14,
            client={"retry_budget_s": 0.2},
            on_teacher_loss="local",
            teacher_ckpt=str(ckpt),
            teacher={"batch_size": BATCH_SIZE},
        )
        with closing(open_source(config, run="a")) as source:
            link.fault, link.every = goes_away(link, lambda: source.counters()["clips_computed"] >= 30), 8
            assert train(config, source) == undisturbed(14)
            counters = source.counters()
    assert counters["teacher_losses"] == 1
    assert counters["teacher_lost_s"] > 0
    assert 30 <= counters["clips_computed"] < 400  # of 420
    assert link.num_answers > 8 + 8  # those of a step


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch_size": BATCH_SIZE + 1}])
def test_a_reserve_that_is_not_the_services_teacher_is_refused(teacher, tmp_path, other):
    ckpt = save_teacher(tmp_path / "teacher", other.get("seed", 0))
    with serving(teacher) as (url, _):
        config = run_of(
            tmp_path / "run",
            url,
            on_teacher_loss="local",
            teacher_ckpt=str(ckpt),
            teacher={"batch_size": other.get("batch_size", BATCH_SIZE)},
        )
        with pytest.raises(
            TeacherMismatchError, match="the reserve of --on-teacher-loss local is not what the service runs"
        ):
            open_source(config, run="a")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_masked_targets_train_alike_for_fewer_bytes(dtype, teacher, tmp_path):
    losses, received = [], []
    with serving(teacher) as (url, _):
        for masked in (False, True):
            config = run_of(tmp_path / str(masked), url, target_dtype=dtype, masked_targets=masked)
            with closing(open_source(config, run="a")) as source:
                losses.append(train(config, source))
                received.append(source.counters()["bytes_down"])
    assert losses[0] == losses[1]
    assert received[1] < received[0]


# --- two workers ---


@pytest.mark.slow
def test_one_rank_that_loses_its_teacher_stops_both_with_its_sentence(teacher, tmp_path):
    """Before the run and in it. The other rank's service is whole: alone it would wait in an exchange until
    that times out."""
    with serving(teacher) as (url, _), linked(url) as link:
        link.fault, link.every = goes_away(link, lambda: False), 8
        (tmp_path / "run").mkdir()
        torch.multiprocessing.spawn(_rank, ([url, link.url], tmp_path), nprocs=2)
    for when, sentence in (
        ("opening", "no teacher answered at http://127.0.0.1:1 for"),
        ("training", f"the teacher at {link.url} failed for"),
    ):
        said = [(tmp_path / f"{when}-{rank}").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
        assert said[0].startswith(f"TeacherUnavailableError: {sentence}")


def _rank(rank: int, urls: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    values = {
        "steps": 10,
        "batch_size": 48,
        "out": str(folder / "run"),
        "view": VIEW,
        "client": CLIENT | {"retry_budget_s": 0.5},
    }
    config = small_run(StudentRun, teacher_url=urls[rank], **values)
    nowhere = small_run(StudentRun, teacher_url=[urls[0], "http://127.0.0.1:1"][rank], **values)
    assert isinstance(config, StudentRun)
    assert isinstance(nowhere, StudentRun)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_source, nowhere, run="a", rank=rank)
        _say(folder / f"opening-{rank}", lambda: Ranks(2).result(opening))
        if rank == 0:
            opening.result().close()
    with closing(open_source(config, run="a", rank=rank)) as source:
        worker = Worker(rank=rank, world_size=2, device=CPU)
        _say(
            folder / f"training-{rank}",
            lambda: train_on(RandomClips(config.view.clip_shape), [source], config, worker, None),
        )  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


def _say(path: Path, fails: Callable[[], object]) -> None:
    try:
        fails()
    except TeacherUnavailableError as error:
        path.write_text(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def answering(*answers: bytes, pause_s: float = 0.0):
    """The URL of a server that gives each request the next of these answers, as bytes; the last one again and
    again. ``pause_s``: between two of its bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def serve():
            left = list(answers)
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    while connection.recv(65536):
                        answer = left.pop(0) if len(left) > 1 else left[0]
                        for start in range(0, len(answer), 1 if pause_s else len(answer)):
                            connection.sendall(answer[start : start + (1 if pause_s else len(answer))])
                            time.sleep(pause_s)

        serving_ = pool.submit(serve)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            listening.close()
            serving_.result(timeout=10)


def plain(status: int, body: bytes, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status} x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


DEEP = b'{"error": ' + 100_000 * b"[" + b"}"
REFUSAL = b'{"error": "no such route", "expected": "a", "got": "b", "hint": "c"}'


@pytest.mark.parametrize(
    ("answer", "after_s"),
    [
        (plain(503, b"", "Retry-After: 3600"), 10.0),
        (plain(429, b"", "Retry-After: 9" + 400 * "9"), 0.0),
        (plain(503, b"", "Retry-After: \xb2"), 0.0),
        (plain(503, b"", "Retry-After: 0.25"), 0.25),
        (plain(503, b"", "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT"), 0.0),
        (plain(500, DEEP), 0.0),
        (plain(404, b"<html>not found</html>"), 0.0),
        (plain(200, DEEP), 0.0),
    ],
    ids=["an-hour", "enormous", "a-superscript", "a-quarter", "a-date", "deep", "a-proxys-404", "deep-200"],
)
def test_what_a_bad_server_says_is_worth_another_try(answer, after_s):
    with answering(answer) as url, closing(ServiceClient(url, ServiceClientConfig(), "run")) as client:
        with pytest.raises(RetryableError) as raised:
            client._facts()
        assert raised.value.after_s == after_s


def test_a_404_of_the_service_itself_is_no_matter_of_waiting():
    with (
        answering(plain(404, REFUSAL)) as url,
        closing(ServiceClient(url, ServiceClientConfig(), "run")) as client,
        pytest.raises(ValueError, match="refused a request: 404 no such route"),
    ):
        client.teacher()


def test_another_web_server_is_told_by_its_title():
    page = b"\n<!DOCTYPE html>\n<html><head>\n<title>My\n page</title></head><body>" + 9000 * b"x"
    for status, kind, begins in ((200, ValueError, "http.* answers with "), (404, RetryableError, "404 ")):
        with (
            answering(plain(status, page)) as url,
            closing(ServiceClient(url, ServiceClientConfig(), "run")) as client,
        ):
            with pytest.raises(kind, match=rf"^{begins}a web page with the title 'My page'[^\n]*$"):
                client._facts()
            assert client.retries.was_reached == (status == 200)


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_dripping_answer_ends_with_the_time_for_a_whole_one(where):
    answer = plain(200, b" " * 400) if where == "body" else plain(200, b"", "X-A: " + 400 * "a")
    with answering(answer, pause_s=0.05) as url:
        config = ServiceClientConfig(timeout_s=0.5)
        with closing(ServiceClient(url, config, "run")) as client:
            started = time.monotonic()
            with pytest.raises(RetryableError, match="TimeoutError"):
                client._facts()
            assert time.monotonic() - started < 5
