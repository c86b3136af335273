"""Shards that are not on this machine: the same clips, retries, what is missing or replaced, and the cache on
a local disk."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from pack_tools import VIEW, samples_of
from s3_server import CREDENTIALS, S3Server, s3_server

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import LoaderConfig, MixConfig
from salt_distill.common.data.making.mix import mix
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.shard_cache import ShardCache
from salt_distill.common.folders import folder as files
from salt_distill.common.folders.folder import Folder
from salt_distill.common.whole import PARTIAL

SLOTS = range(35, 47)  # into the second pass


def new_reader(data: object, split: str = "train", **loader) -> Reader:
    config = LoaderConfig.model_validate({"decode_processes": 0, **loader})
    return Reader(str(data), data_seed=0, views="fresh", view=VIEW, split=split, loader=config)


@pytest.fixture
def bucket(shards, tmp_path, monkeypatch):
    """The packed data set ``toy`` in an S3 bucket."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(shards, tmp_path / "bucket" / "toy")
    with s3_server(tmp_path / "bucket") as server:
        yield server


class Flaky(MemoryFileSystem):
    """fsspec's files in memory, whose next readings fail."""

    protocol = "flaky"
    cachable = False
    failures = 0
    ranges: Counter[str] = Counter()  # noqa: RUF012 - fsspec makes instances of its own

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **options):
        self._may_fail()
        Flaky.ranges[f"{Path(path).name} {start}-{end}"] += 1
        return super().cat_file(path, start=start, end=end, **options)

    def _open(self, path, *arguments, **options):
        self._may_fail()
        return super()._open(path, *arguments, **options)

    def _may_fail(self):
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise OSError("the store is being moved")


@pytest.fixture
def flaky(shards, monkeypatch) -> str:
    """The packed data set in a store that fails on request."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "failures", 0)
    monkeypatch.setattr(Flaky, "ranges", Counter())
    monkeypatch.setattr(files, "_FIRST_PAUSE_S", 0.001)
    store = Flaky()
    for path in shards.iterdir():
        store.pipe_file(f"/data/toy/{path.name}", path.read_bytes())
    return "flaky://data/toy"


# --- reading ---


def test_an_object_store_gives_the_same_clips_by_reading_only_their_samples(shards, bucket: S3Server):
    local, reader = new_reader(shards).clips(SLOTS), new_reader(bucket.address("toy"), decode_processes=1)
    batch = reader.clips(SLOTS)
    reader.close()
    assert batch.digests == local.digests
    assert batch.keys == local.keys
    samples = samples_of(shards)
    wanted = {
        f"toy/{s.tar} bytes={s.offset}-{s.offset + s.size - 1}" for s in (samples[key] for key in batch.keys)
    }
    assert {request for request in bucket.requests if ".tar" in request} == wanted


def test_a_store_of_fsspec_and_a_file_url_do_as_well(shards, flaky):
    clips = new_reader(shards).clips(SLOTS)
    assert new_reader(flaky).clips(SLOTS).digests == clips.digests
    samples = samples_of(shards)
    assert Flaky.ranges == Counter(
        f"{s.tar} {s.offset}-{s.offset + s.size}" for s in (samples[key] for key in clips.keys)
    )
    assert new_reader(f"file://{shards}").clips(SLOTS).digests == clips.digests
    assert Folder(f"file://{shards}").local == shards


def test_an_address_that_is_none_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"got nowhere://data, expected a path or a URL such as s3://BUCKET/FOLDER"
    ):
        new_reader("nowhere://data")
    with pytest.raises(FileNotFoundError, match=r"got no dataset\.json and no tar in it"):
        new_reader(tmp_path)


def test_an_index_is_not_made_in_a_store(bucket: S3Server):
    (bucket.folder / "toy" / "dataset.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"toy.*: got no dataset\.json in it, expected a folder that `salt-data pack` wrote",
    ):
        new_reader(bucket.address("toy"))


# --- failures ---


def test_a_store_that_fails_for_a_while_is_asked_again(flaky, shards):
    reader = new_reader(flaky)
    Flaky.failures = 5
    batch = reader.clips(SLOTS)
    assert batch.digests == new_reader(shards).clips(SLOTS).digests
    counters = reader.counters()
    assert (counters["clips"], counters["bad_clips"], counters["store_retries"]) == (12, 0, 5)


def test_a_store_that_does_not_answer_is_asked_again(bucket: S3Server, shards):
    reader = new_reader(bucket.address("toy"))
    bucket.stalls = 1
    assert reader.clips(SLOTS).digests == new_reader(shards).clips(SLOTS).digests
    assert not bucket.stalls


def test_a_store_that_goes_on_failing_stops_the_run(flaky, monkeypatch):
    reader = new_reader(flaky)
    monkeypatch.setattr(files, "RETRY_BUDGET_S", 0.05)
    Flaky.failures = 10**9
    with pytest.raises(
        OSError,
        match=r"flaky://data/toy failed for .* s, and the budget is 0\.05 s: .*the store is being moved",
    ):
        reader.clips(SLOTS)
    assert not reader.skipped  # no video is to blame


def test_a_store_that_refuses_is_not_asked_again(bucket: S3Server):
    reader = new_reader(bucket.address("toy"))
    bucket.denied = True
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        reader.clips(SLOTS)
    assert reader.counters()["store_retries"] == 0


@pytest.mark.parametrize("place", ["disk", "store"])
def test_a_missing_shard_is_an_error_at_once(bucket: S3Server, place):
    lost = sorted((bucket.folder / "toy").glob("*.tar"))[1]
    lost.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=rf"1 of its \d+ shards are not there, the first is .*{lost.name}: copy them anew",
    ):
        new_reader(bucket.folder / "toy" if place == "disk" else bucket.address("toy"))


@pytest.mark.parametrize("place", ["disk", "store"])
@pytest.mark.parametrize(
    ("change", "reason"), [("gone", "cannot be read|is not there"), ("cut", "the tar was cut or replaced")]
)
def test_a_shard_that_goes_missing_later_costs_its_samples(bucket: S3Server, place, change, reason):
    reader = new_reader(
        bucket.folder / "toy" if place == "disk" else bucket.address("toy"), max_bad_fraction=1
    )
    shard = next(shard for shard in reader.samples if len(shard))
    path = bucket.folder / "toy" / shard[0].tar
    path.unlink() if change == "gone" else path.write_bytes(b"short")
    batch = reader.clips(range(40))
    assert {key for key, good in zip(batch.keys, batch.good, strict=True) if not good} == {
        sample.key for sample in shard
    }
    assert set(reader.skipped) == {sample.key for sample in shard}
    for sample in shard:
        with pytest.raises(BadVideoError, match=reason):
            reader.submit(sample, 0).result()


def test_a_shard_that_was_replaced_in_the_store_is_noticed(bucket: S3Server):
    reader = new_reader(bucket.address("toy"))
    shard = next(shard for shard in reader.samples if len(shard) > 1)
    path = bucket.folder / "toy" / shard[0].tar
    data = bytearray(path.read_bytes())
    data[shard[0].offset + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadVideoError, match="are not those that were indexed, so the tar was replaced since"):
        reader.submit(shard[0], 0).result()
    reader.submit(shard[1], 0).result()


def test_a_mixture_in_a_store_reads_from_its_sources(bucket: S3Server):
    sources = [
        {"path": "toy", "name": "a", "weight": 0.75},
        {"path": "toy", "name": "b", "split": "test", "weight": 0.25},
    ]
    (bucket.folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "both", "sources": sources}))
    mix(MixConfig(recipe=str(bucket.folder / "recipe.yaml"), out=str(bucket.folder / "both")))
    local, reader = new_reader(bucket.folder / "both", "all"), new_reader(bucket.address("both"), "all")
    batch = reader.clips(range(80))
    assert batch.digests == local.clips(range(80)).digests
    assert Counter(key.split("/")[0] for key in batch.keys) == {"a": 60, "b": 20}
    assert [view for key, view in zip(batch.keys, batch.views, strict=True) if key.startswith("a/")] == [
        0
    ] * 40 + [1] * 20
    assert [view for key, view in zip(batch.keys, batch.views, strict=True) if key.startswith("b/")] == [
        0
    ] * 10 + [1] * 10
    (bucket.folder / "elsewhere").mkdir()
    (bucket.folder / "elsewhere" / "link").symlink_to(bucket.folder / "both")
    assert (
        new_reader(bucket.folder / "elsewhere" / "link", "all").clips(range(3)).digests == batch.digests[:3]
    )
    shards = reader.dataset.shards  # which name the files of a target cache
    assert len(set(shards)) == len(shards) > len(set(reader.dataset.tars))
    shutil.rmtree(bucket.folder / "toy")
    with pytest.raises(FileNotFoundError, match="is a mixture of bucket/toy, which is not there"):
        new_reader(bucket.address("both"), "all")


# --- the cache ---


def sha_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "total"]


def test_what_was_read_once_is_not_read_from_the_store_again(bucket: S3Server, shards, tmp_path):
    caching = {"shard_cache_dir": str(tmp_path / "cache")}
    first = new_reader(bucket.address("toy"), **caching)
    clips = new_reader(shards).clips(SLOTS)
    # One at a time: two passes meet in these slots, and a video that both want at the same moment is read by
    # both.
    assert [first.clips([slot]).digests[0] for slot in SLOTS] == list(clips.digests)
    assert first.counters()["shard_cache_misses"] == len(set(clips.keys)) < len(SLOTS)
    before = sum(count for request, count in bucket.requests.items() if ".tar" in request)
    second = new_reader(bucket.address("toy"), **caching)
    assert second.clips(SLOTS).digests == clips.digests
    assert second.counters()["shard_cache_hits"] == 12
    assert sum(count for request, count in bucket.requests.items() if ".tar" in request) == before
    third = new_reader(shards, **caching)  # a disk of this machine, and the same cache
    assert third.clips(SLOTS).digests == clips.digests
    assert third.counters()["shard_cache_hits"] == 12


def test_a_disk_that_never_answers_costs_its_videos_where_there_is_a_cache(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "toy")
    loader = {"decode_processes": 1, "decode_timeout_s": 3, "shard_cache_dir": str(tmp_path / "cache")}
    reader = new_reader(tmp_path / "toy", **loader)
    shard, other = [shard for shard in reader.samples if len(shard)][:2]
    (tmp_path / "toy" / shard[0].tar).unlink()
    os.mkfifo(tmp_path / "toy" / shard[0].tar)
    assert reader.evaluation([shard[0], other[0]]).good.tolist() == [False, True]
    assert reader.skipped == {shard[0].key: "the decoder did not answer within 3 s"}
    reader.close()


def test_a_damaged_file_of_the_cache_is_read_anew(bucket: S3Server, tmp_path):
    reader = new_reader(bucket.address("toy"), shard_cache_dir=str(tmp_path / "cache"))
    digests = reader.clips(SLOTS).digests
    for path in kept(tmp_path / "cache"):
        path.write_bytes(path.read_bytes()[:-1])
    assert reader.clips(SLOTS).digests == digests
    assert all(sha_of(path.read_bytes()) == path.parent.name + path.name for path in kept(tmp_path / "cache"))


def test_the_cache_keeps_what_was_read_last(tmp_path):
    cache = ShardCache(tmp_path, 10_000)
    blobs = [blob(number) for number in range(14)]
    for number, data in enumerate(blobs[:10]):
        cache.put(sha_of(data), data)
        os.utime(cache._path(sha_of(data)), (number, number))
    assert cache.get(sha_of(blobs[0])) == blobs[0]  # which makes it the newest
    for data in blobs[10:]:
        cache.put(sha_of(data), data)
        assert sum(path.stat().st_size for path in kept(tmp_path)) <= 10_000
    there = [cache.get(sha_of(data)) is not None for data in blobs]
    assert there[0]
    assert there[10:] == [True] * 4
    assert not there[1]
    cache.put(sha_of(blob(0, 20_000)), blob(0, 20_000))
    assert cache.get(sha_of(blob(0, 20_000))) is None


def test_the_cache_touches_nothing_else(tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "thesis.txt").write_text("years of work")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ("0" * 62)).write_text("more of it")
    cache = ShardCache(tmp_path, 2500)
    for number in range(20):
        cache.put(sha_of(blob(number)), blob(number))
    assert (tmp_path / "ab" / "thesis.txt").exists()
    assert (tmp_path / "notes" / ("0" * 62)).exists()


def test_a_writer_that_was_killed_leaves_nothing_that_counts(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    partial = cache._path(sha_of(blob(0)))
    partial = partial.with_name(f"{PARTIAL}{partial.name}")
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    (tmp_path / "total").write_text(f"{2900:20d}")  # counted, but never put
    assert cache.get(sha_of(blob(0))) is None
    cache.put(sha_of(blob(1)), blob(1))
    assert cache.get(sha_of(blob(1))) == blob(1)
    assert not partial.exists()
    cache.put(sha_of(blob(2)), blob(2))
    assert len(kept(tmp_path)) == 2  # the count is right again


def test_processes_share_a_cache(tmp_path):
    script = f"""if True:
        import hashlib, sys
        import numpy as np
        from salt_distill.common.data.shard_cache import ShardCache
        cache = ShardCache({str(tmp_path)!r}, 20_000)
        rng = np.random.default_rng(int(sys.argv[1]))
        for number in rng.integers(0, 40, 300).tolist():
            data = np.random.default_rng(number).bytes(1000)
            name = hashlib.sha256(data).hexdigest()
            found = cache.get(name)
            assert found in (None, data)
            cache.put(name, data)
    """
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(number)], cwd=Path(__file__).parent.parent)
        for number in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    files_left = kept(tmp_path)
    assert 10 <= len(files_left) <= 20
    assert int((tmp_path / "total").read_text()) == 1000 * len(files_left)
    assert all(sha_of(path.read_bytes()) == path.parent.name + path.name for path in files_left)
