"""--cache of a student: what a service gave is not asked for again, and nothing about the targets changes."""

import pytest
import torch
from teacher_tools import batch_of, load_teacher, random_clips, serving

from salt_distill.common.config import ServiceClientConfig, StudentRun
from salt_distill.common.targets import codec
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.student_trainer.targets.local_targets import LocalTargets
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.student_trainer.targets.source import source_order

CLIENT = ServiceClientConfig(request_clips=3, connections=2, timeout_s=20, retry_budget_s=20)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tmp_path_factory.mktemp("ckpt"))


def source_of(url, cache, dtype="float16", **client):
    return ServiceTargets(url, dtype, CLIENT.model_copy(update=client), "run", cache=str(cache))


def local(teacher, batch, dtype="float16"):
    source = LocalTargets(teacher, dtype)
    try:
        return source.request(batch).result(timeout=60)
    finally:
        source.close()


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_a_second_run_asks_for_nothing_and_has_the_same_bits(teacher, tmp_path, dtype):
    batch = batch_of(random_clips(8), bad=(4,))
    expected = local(teacher, batch, dtype)
    asked = []
    with serving(teacher) as (url, inside):
        for hits in (0, 7):
            source = source_of(url, tmp_path, dtype)
            assert torch.equal(source.request(batch).result(timeout=60), expected)
            source.close()
            assert source.counters()["cache_hits"] == hits
            asked.append(inside.batcher.counters.requests)
    assert asked[0] == asked[1] > 0
    assert len(TargetCache(tmp_path)) == 7


def test_ranks_write_side_by_side_and_a_later_epoch_finds_all(teacher, tmp_path):
    batches = [batch_of(random_clips(6, seed)) for seed in range(2)]
    with serving(teacher) as (url, inside):
        ranks = [source_of(url, tmp_path, segment_bytes=1) for _ in batches]  # every answer is sealed
        for rank, batch in zip(ranks, batches, strict=True):
            rank.request(batch).result(timeout=60)
        before = inside.batcher.counters.requests
        for rank in ranks:
            for batch in batches:
                assert torch.equal(rank.request(batch).result(timeout=60), local(teacher, batch))
        # the last one to seal has seen everybody's files, the other one asks for what came later
        assert inside.batcher.counters.requests - before <= 2
        for rank in ranks:
            rank.close()
    assert len(TargetCache(tmp_path)) == 12


def test_a_damaged_target_is_asked_for_again(teacher, tmp_path):
    batch = batch_of(random_clips(3))
    with serving(teacher) as (url, _):
        source = source_of(url, tmp_path)
        expected = source.request(batch).result(timeout=60)
        source.close()
        path = next(tmp_path.rglob("segments/*.arrow"))
        [encoded] = codec.encode(expected[1:2], "float16")
        data = bytearray(path.read_bytes())
        data[data.index(bytes(encoded.target)) + 9] ^= 1
        path.write_bytes(data)
        source = source_of(url, tmp_path)
        assert torch.equal(source.request(batch).result(timeout=60), expected)
        source.close()
        counters = source.counters()
    assert (counters["cache_hits"], counters["cache_corrupt"], counters["cache_not_written"]) == (2, 1, 0)


def test_a_disk_that_fails_costs_no_step(teacher, tmp_path):
    batch = batch_of(random_clips(3))
    with serving(teacher) as (url, _):
        source = source_of(url, tmp_path, segment_bytes=1)
        (tmp_path / "segments").rmdir()
        (tmp_path / "segments").write_text("not a folder any more")
        assert torch.equal(source.request(batch).result(timeout=60), local(teacher, batch))
        source.close()
        assert source.counters()["cache_not_written"] == 3


def test_a_folder_of_another_teacher_is_refused(teacher, tmp_path, tmp_path_factory):
    with serving(teacher) as (url, _):
        source_of(url, tmp_path).close()
    with (
        serving(load_teacher(tmp_path_factory.mktemp("other"), seed=1)) as (url, _),
        pytest.raises(ValueError, match="got a cache with fingerprint="),
    ):
        source_of(url, tmp_path)


def test_what_cannot_be_cached_is_refused_and_the_order_is_said():
    run = {
        "data": "d",
        "out": "o",
        "steps": 5,
        "optim": {"warmup_steps": 0},
        "teacher_url": "http://h",
        "cache": "c",
    }
    with pytest.raises(ValueError, match="got --cache with --views fresh"):
        StudentRun.model_validate(run)
    with pytest.raises(ValueError, match="got --cache with --masked-targets"):
        StudentRun.model_validate({**run, "views": 2, "masked_targets": True})
    kept = {**run, "views": 2, "on_teacher_loss": "local", "teacher_ckpt": "t"}
    assert (
        source_order(StudentRun.model_validate(kept), 0)
        == "cache c, then service http://h, then in process t"
    )
