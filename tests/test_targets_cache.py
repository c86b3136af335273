"""The target cache."""

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from salt_distill.common.clip import clip_digest
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.targets import cache_file, codec
from salt_distill.common.targets.manifest import MANIFEST, CacheSpec, FileListing, Manifest
from salt_distill.common.targets.target_cache import TargetCache

TEACHER = TeacherSpec(
    name="t",
    fingerprint="f" * 64,
    compute={"device": "cpu"},
    clip_shape=(2, 8, 8, 3),
    grid=(1, 1, 5),
    width=8,
    num_parameters=1,
)
SPEC = CacheSpec(
    teacher=TEACHER,
    target_dtype="int8",
    shape=(5, 8),
    data_seed=3,
    views=2,
    view={"num_frames": 4},
    decoder="decoder 1",
    index_hash="a" * 64,
    split="train",
)


def rows_of(view, count=7):
    targets = torch.randn(count, 5, 8, generator=torch.Generator().manual_seed(view))
    return [
        cache_file.CacheRow(
            clip_digest=np.random.default_rng([view, number]).bytes(32),
            key=f"source/{number}",
            view=view,
            encoded=encoded,
        )
        for number, encoded in enumerate(codec.encode(targets, "int8"))
    ]


def write_cache(root):
    files = {}
    for view in range(2):
        name = cache_file.file_path(SPEC, view, "train-000000.tar")
        num_rows = cache_file.write_file(root / name, SPEC, rows_of(view))
        files[name] = FileListing.of(root / name, num_rows)
    Manifest(spec=SPEC, files=files, skipped=("source/bad",)).write(root)
    return files


@pytest.fixture
def cache_root(tmp_path):
    write_cache(tmp_path)
    return tmp_path


def test_every_row_is_found_by_its_digest(cache_root):
    cache = TargetCache(cache_root)
    assert (len(cache), cache.spec, cache.skipped) == (14, SPEC, ("source/bad",))
    for row in rows_of(0) + rows_of(1):
        found = cache.find(row.clip_digest)
        assert (found.key, found.view, found.encoded.checksum) == (row.key, row.view, row.encoded.checksum)
        assert torch.equal(
            *(codec.decode(one.encoded, "int8", num_tokens=5, width=8) for one in (row, found))
        )


def test_other_digests_are_misses_even_with_a_common_prefix(cache_root):
    cache = TargetCache(cache_root)
    known = rows_of(0)[0].clip_digest
    assert cache.find(known[:31] + bytes([known[31] ^ 1])) is None
    assert cache.find(bytes(32)) is None
    assert cache.find(b"\xff" * 32) is None


def test_many_record_batches_are_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_file, "_BATCH_BYTES", 2 * codec.num_bytes("int8", 5, 8))
    write_cache(tmp_path)
    assert (
        pa.ipc.open_file(tmp_path / cache_file.file_path(SPEC, 0, "train-000000.tar")).num_record_batches == 4
    )
    cache = TargetCache(tmp_path)
    assert [cache.find(row.clip_digest).key for row in rows_of(1)] == [row.key for row in rows_of(1)]
    wanted = [rows_of(1)[5], rows_of(0)[6], rows_of(1)[0], rows_of(0)[6]]
    digests = [row.clip_digest for row in wanted]
    found = cache.targets([*digests[:2], bytes(32), *digests[2:]])
    assert [one and (bytes(one.target), bytes(one.scale), one.checksum) for one in found] == [
        None if row is None else (bytes(row.encoded.target), bytes(row.encoded.scale), row.encoded.checksum)
        for row in (*wanted[:2], None, *wanted[2:])
    ]


def test_plain_pyarrow_reads_it_and_the_manifest_lists_it(cache_root):
    manifest = json.loads((cache_root / "manifest.json").read_text())
    assert list(manifest["files"]) == [f"{'f' * 64}/view-{view}/train-000000.arrow" for view in range(2)]
    for name, facts in manifest["files"].items():
        table = pa.ipc.open_file(pa.memory_map(str(cache_root / name))).read_all()
        assert table.schema.names == ["clip_digest", "key", "view", "target", "scale", "checksum"]
        assert facts["rows"] == len(table) == 7
    assert (manifest["fingerprint"], manifest["views"], manifest["data_seed"], manifest["decoder"]) == (
        "f" * 64,
        2,
        3,
        "decoder 1",
    )


def test_writing_again_gives_the_same_bytes(cache_root, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    write_cache(again)
    names = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(names) == 3
    assert all((again / name).read_bytes() == (cache_root / name).read_bytes() for name in names)


def test_no_file_is_seen_before_it_is_whole(tmp_path):
    def dies():
        yield rows_of(0)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_file.write_file(tmp_path / "a.arrow", SPEC, dies())
    assert not (tmp_path / "a.arrow").exists()
    with pytest.raises(ValueError, match=r"expected a target cache with a manifest\.json"):
        TargetCache(tmp_path)


def flip(path, found_at, skip=3):
    data = bytearray(path.read_bytes())
    data[data.index(found_at) + skip] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_of_a_target_or_a_scale_is_named(cache_root):
    path = cache_root / cache_file.file_path(SPEC, 0, "train-000000.tar")
    rows = rows_of(0)
    flip(path, bytes(rows[4].encoded.target))
    flip(path, bytes(rows[5].encoded.scale))
    file = cache_file.CacheFile(path, SPEC)
    whole, damage = file.check()
    assert [row.key for row in file.rows(whole)] == [f"source/{number}" for number in (0, 1, 2, 3, 6)]
    assert [
        f"row {number}, sample source/{number}, view 0" in str(error)
        for number, error in zip((4, 5), damage, strict=True)
    ] == [
        True,
        True,
    ]
    for row in rows[4:6]:
        found = TargetCache(cache_root).find(row.clip_digest)
        with pytest.raises(codec.CorruptTargetError):
            codec.decode(found.encoded, "int8", num_tokens=5, width=8)


def test_a_flipped_byte_of_a_digest_is_refused(cache_root):
    path = cache_root / cache_file.file_path(SPEC, 0, "train-000000.tar")
    flip(path, rows_of(0)[4].clip_digest)
    with pytest.raises(
        codec.CorruptTargetError, match=r"train-000000.arrow, record batch 0: got clip digests with hash"
    ):
        TargetCache(cache_root)
    whole, damage = cache_file.CacheFile(path, SPEC).check()
    assert (len(whole), len(damage)) == (7, 1)


@pytest.mark.parametrize("part", [b'"skipped"', b'"rows"', b'"decoder 1"', b'"sha256"', b"source/bad"])
def test_a_flipped_byte_of_the_manifest_is_refused(cache_root, part):
    flip(cache_root / MANIFEST, part)
    with pytest.raises(codec.CorruptTargetError, match=r"manifest\.json is damaged"):
        TargetCache(cache_root)


def test_a_cut_or_missing_file_is_refused(cache_root):
    path = cache_root / cache_file.file_path(SPEC, 1, "train-000000.tar")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no readable cache file"):
        TargetCache(cache_root)
    path.unlink()
    with pytest.raises(ValueError, match="is missing, expected 7 targets"):
        TargetCache(cache_root)


def test_a_file_of_another_teacher_or_seed_is_refused(cache_root):
    path = cache_root / cache_file.file_path(SPEC, 0, "train-000000.tar")
    with pytest.raises(ValueError, match="data_seed=3, expected 4"):
        cache_file.CacheFile(path, SPEC.model_copy(update={"data_seed": 4}))


def test_a_cache_may_have_more_files_than_a_process_may_open_by_default(tmp_path):
    files = {}
    for shard in range(1200):
        name = cache_file.file_path(SPEC, 0, f"train-{shard:06}.tar")
        if shard == 0:
            num_rows = cache_file.write_file(tmp_path / name, SPEC, rows_of(0, count=1))
            listing = FileListing.of(tmp_path / name, num_rows)
            first = tmp_path / name
        else:
            os.link(first, tmp_path / name)
        files[name] = listing
    Manifest(spec=SPEC, files=files).write(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        assert len(TargetCache(tmp_path)) == 1200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("dtype", codec.TARGET_DTYPES)
def test_the_reader_of_the_layouts_page_reads_the_same_values(dtype, tmp_path):
    """As it stands in docs/cache-layout.md; it knows nothing of this project."""
    page = (Path(__file__).parents[1] / "docs" / "cache-layout.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert not re.search(r"salt_distill", block)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/cache-layout.md", "exec"), names)
    spec = SPEC.model_copy(update={"target_dtype": dtype})
    clips = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8)
    encoded = codec.encode(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), dtype)
    rows = [
        cache_file.CacheRow(clip_digest=clip_digest(clip), key=None, view=None, encoded=each)
        for clip, each in zip(clips, encoded, strict=True)
    ]
    name = cache_file.file_path(spec, 0, "train-000000.tar")
    num_rows = cache_file.write_file(tmp_path / name, spec, rows)
    Manifest(spec=spec, files={name: FileListing.of(tmp_path / name, num_rows)}, skipped=("ä",)).write(
        tmp_path
    )
    found = names["read"](tmp_path)
    assert len(found) == 3
    for clip, each in zip(clips, encoded, strict=True):
        expected = codec.decode(each, dtype, num_tokens=5, width=8)
        assert torch.equal(torch.from_numpy(found[names["digest"](clip)].copy()), expected)
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged"):
        names["read"](tmp_path)
