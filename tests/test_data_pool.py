"""The decoding pool: what crashes, stalls or raises costs its own item, and no process is left behind."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.pool import DecodePool
from tests.pool_calls import call


@pytest.fixture
def pool():
    pool = DecodePool(2, timeout_s=60, call=call)
    yield pool
    pool.close()


def gone(pid: int, *, within_s: float) -> bool:
    """Whether a process ends in time; one that ended but was not asked for counts."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_items_are_answered_by_other_processes(pool):
    answers = [pool.submit(("array", np.full((3, 5), number))) for number in range(8)]
    for number, answer in enumerate(answers):
        total, array = answer.result()
        assert total == 15 * number
        assert np.array_equal(array, np.arange(15).reshape(3, 5))
        array += 1  # it is ours
    pids = {pool.submit(("pid", None)).result() for _ in range(4)}
    assert os.getpid() not in pids


def test_a_crash_of_the_decoder_costs_its_item(pool):
    answers = [pool.submit(item) for item in [("a", None), ("crash", None), ("b", None), ("c", None)]]
    with pytest.raises(BadVideoError, match=r"^the decoder crashed \(signal 11\)$"):
        answers[1].result()
    assert [answers[number].result() for number in (0, 2, 3)] == ["a", "b", "c"]


def test_a_signal_in_the_middle_of_a_call_costs_its_item():
    pool = DecodePool(1, timeout_s=60, call=call)
    pid = pool.submit(("pid", None)).result()
    answer, after = pool.submit(("sleep", 30)), pool.submit(("pid", None))
    time.sleep(0.2)
    os.kill(pid, signal.SIGSEGV)
    with pytest.raises(BadVideoError, match=r"the decoder crashed \(signal 11\)"):
        answer.result(timeout=10)
    assert after.result() != pid
    pool.close()


def test_a_named_pipe_that_never_answers_costs_its_item(tmp_path):
    os.mkfifo(tmp_path / "silent.mp4")
    pool = DecodePool(1, timeout_s=0.5, call=call)
    pid = pool.submit(("pid", None)).result()
    answers = [pool.submit(("read", tmp_path / "silent.mp4")), pool.submit(("after", None))]
    with pytest.raises(BadVideoError, match=r"^the decoder did not answer within 0\.5 s$"):
        answers[0].result()
    assert answers[1].result() == "after"
    assert gone(pid, within_s=0.5)
    pool.close()


def test_a_bad_video_is_not_the_end_of_its_worker():
    pool = DecodePool(1, timeout_s=60, call=call)
    pid = pool.submit(("pid", None)).result()
    with pytest.raises(BadVideoError, match=r"^it is grey$"):
        pool.submit(("bad", "it is grey")).result()
    assert pool.submit(("pid", None)).result() == pid
    pool.close()


def test_a_bug_is_no_bad_video(pool):
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        pool.submit(("bug", "x")).result()


def test_what_cannot_be_imported_is_said_at_once(monkeypatch):
    def nowhere(item):
        return item

    nowhere.__module__, nowhere.__qualname__ = "pool_calls_elsewhere", "nowhere"
    monkeypatch.setitem(sys.modules, "pool_calls_elsewhere", type(sys)("pool_calls_elsewhere"))
    sys.modules["pool_calls_elsewhere"].nowhere = nowhere
    pool = DecodePool(1, timeout_s=60, call=nowhere)
    with pytest.raises(RuntimeError, match=r"cannot start \(exit code 1\)"):
        pool.submit(1).result()
    pool.close()


def test_without_workers_it_is_this_process():
    pool = DecodePool(0, timeout_s=60, call=call)
    assert pool.submit(("pid", None)).result() == os.getpid()
    with pytest.raises(KeyError):
        pool.submit(("bug", "x")).result()
    pool.close()


def test_closing_ends_what_hangs_and_what_waits(tmp_path):
    os.mkfifo(tmp_path / "silent.mp4")
    pool = DecodePool(2, timeout_s=600, call=call)
    pids = {answer.result() for answer in [pool.submit(("pid", None)) for _ in range(20)]}
    answers = [pool.submit(("read", tmp_path / "silent.mp4")) for _ in range(5)]
    time.sleep(0.2)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    for answer in answers:
        with pytest.raises(concurrent.futures.CancelledError):
            answer.result()
    assert all(gone(pid, within_s=0.1) for pid in pids)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux ends a process that hangs together with its parent"
)
def test_no_process_outlives_a_killed_parent(tmp_path):
    os.mkfifo(tmp_path / "silent.mp4")
    script = f"""if True:
        import time
        from salt_distill.common.data.pool import DecodePool
        from tests.pool_calls import call
        pool = DecodePool(2, timeout_s=600, call=call)
        pids = set()
        while len(pids) < 2:
            pids |= {{answer.result() for answer in [pool.submit(("pid", None)) for _ in range(20)]}}
        pool.submit(("read", {str(tmp_path / "silent.mp4")!r}))  # one hangs, one waits
        print(*pids, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.2)
        parent.kill()
    assert all(gone(pid, within_s=5) for pid in pids)
