"""salt-serve cache: damage of every kind is named and put right, and what nobody needs goes."""

import io
import json
import re

import pytest
import rich.console
import torch
from teacher_tools import BATCH_SIZE, save_teacher

from salt_distill.common.config import (
    CacheGcConfig,
    CacheStatsConfig,
    CacheVerifyConfig,
    PrecomputeConfig,
    TeacherComputeConfig,
)
from salt_distill.common.targets import codec, store
from salt_distill.common.targets.segments import SegmentStore
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.teacher_server.cache.commands import collect_garbage, show_stats, verify
from salt_distill.teacher_server.precompute import precompute

SPEC = store.CacheSpec(
    teacher={"name": "t", "fingerprint": "f" * 64, "compute": {"device": "cpu"}},
    target_dtype="int8",
    shape=(5, 8),
)


def printing(command, config):
    """What a command said, on one line."""
    console = rich.console.Console(file=io.StringIO(), width=1000)
    command(config, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("ckpt") / "teacher")


@pytest.fixture(scope="module")
def made(shards, ckpt, tmp_path_factory):
    """A cache in int8, so that targets have scales, and its bytes."""
    root = tmp_path_factory.mktemp("targets")
    values = {
        "views": 2,
        "workers": 0,
        "data_seed": 5,
        "target_dtype": "int8",
        "teacher": TeacherComputeConfig(batch_size=BATCH_SIZE),
    }
    printing(precompute, PrecomputeConfig(ckpt=str(ckpt), data=str(shards), out=str(root), **values))
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def root(made, tmp_path):
    for name, data in made.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def a_file(root):
    return sorted(root.rglob("view-1/*.arrow"))[0]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def position_of(root, part):
    """Where a part of the fourth row of a file lies."""
    path = a_file(root)
    row = store.CacheFile(path, TargetCache(root).spec).row(3)
    found = {
        "target": row.encoded.target,
        "scale": row.encoded.scale,
        "digest": row.clip_digest,
        "key": row.key.encode(),
    }
    return path.read_bytes().index(bytes(found[part])) + 1


@pytest.mark.parametrize(
    ("part", "said", "computed"),
    [
        ("target", r"row 3, sample \S+, view 1: got a target with checksum", 1),
        ("scale", r"row 3, sample \S+, view 1: got a target with checksum", 1),
        ("digest", r"record batch 0: got clip digests with hash", 1),
        ("key", r"got \d+ rows with sha256", 0),
        ("footer", r"\.arrow: got", 0),
        ("manifest", r"manifest\.json is damaged", 0),
    ],
)
def test_one_flipped_byte_is_named_and_only_that_is_computed_again(
    root, made, shards, ckpt, part, said, computed
):
    if part == "manifest":
        flip(root / store.MANIFEST, (root / store.MANIFEST).read_bytes().index(b'"rows"') + 2)
    elif part == "footer":
        flip(a_file(root), -40)
    else:
        flip(a_file(root), position_of(root, part))
    with pytest.raises(codec.CorruptTargetError, match="1 of its files are damaged: add --repair"):
        printing(verify, CacheVerifyConfig(targets=str(root)))
    printed = printing(
        verify, CacheVerifyConfig(targets=str(root), repair=True, ckpt=str(ckpt), data=str(shards))
    )
    assert re.search(said, printed)
    all_of_the_file = len(store.CacheFile(a_file(root), TargetCache(root).spec))
    # an unreadable footer leaves no row to keep
    assert f"{computed} targets computed again" in printed or (
        part == "footer" and f"{all_of_the_file} targets computed again" in printed
    )
    assert {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()} == made
    assert "nothing is damaged" in printing(verify, CacheVerifyConfig(targets=str(root)))


def test_a_missing_file_and_a_lost_manifest(root, made, shards, ckpt):
    a_file(root).unlink()
    (root / store.MANIFEST).write_text("{")
    printed = printing(
        verify, CacheVerifyConfig(targets=str(root), repair=True, ckpt=str(ckpt), data=str(shards))
    )
    assert "manifest.json is damaged" in printed
    assert {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()} == made


def test_another_teacher_or_data_set_repairs_nothing(root, made, shards, tmp_path_factory):
    flip(a_file(root), position_of(root, "target"))
    other = save_teacher(tmp_path_factory.mktemp("other") / "teacher", seed=1)
    with pytest.raises(ValueError, match="holds targets with fingerprint="):
        printing(verify, CacheVerifyConfig(targets=str(root), repair=True, ckpt=str(other), data=str(shards)))
    with pytest.raises(ValueError, match="without --ckpt and --data"):
        printing(verify, CacheVerifyConfig(targets=str(root), repair=True))


def segments(root, count=3, of_each=4):
    """A cache that was written through, and its targets."""
    kept = {}
    writer = SegmentStore(root, SPEC, segment_bytes=10**9)
    for number in range(count):
        targets = codec.encode(
            torch.randn(of_each, 5, 8, generator=torch.Generator().manual_seed(number)), "int8"
        )
        kept |= {bytes([number, row]) * 16: target for row, target in enumerate(targets)}
        writer.add(kept)
        writer.seal()
    writer.close()
    return kept


def test_of_segments_what_is_damaged_is_dropped(tmp_path):
    kept = segments(tmp_path)
    lost = bytes([1, 2]) * 16
    path = next(path for path in tmp_path.rglob("*-1.arrow"))
    flip(path, path.read_bytes().index(bytes(kept[lost].target)) + 5)
    assert "3 segments are left" in printing(verify, CacheVerifyConfig(targets=str(tmp_path), repair=True))
    cache = TargetCache(tmp_path)
    assert {digest for digest in kept if cache.find(digest) is None} == {lost}


def test_gc_removes_what_no_manifest_lists_and_the_oldest_segments(tmp_path):
    segments(tmp_path)
    left_over = [tmp_path / "segments" / ".partial-a.arrow", tmp_path / "segments" / "b.arrow"]
    for path in left_over:
        path.write_bytes(b"0" * 1000)
    size = next(tmp_path.rglob("*-2.arrow")).stat().st_size
    config = {"targets": str(tmp_path), "max_bytes": 2 * size + 100}
    assert "would be freed" in printing(collect_garbage, CacheGcConfig(**config, dry_run=True))
    assert len(TargetCache(tmp_path)) == 12
    assert all(path.exists() for path in left_over)
    printed = printing(collect_garbage, CacheGcConfig(**config))
    assert "not in the manifest: segments/b.arrow" in printed
    cache = TargetCache(tmp_path)
    assert len(cache) == 8
    assert cache.find(bytes([0, 0]) * 16) is None
    assert sorted(path.name[-8:] for path in tmp_path.rglob("*.arrow")) == ["-1.arrow", "-2.arrow"]


def test_nothing_is_removed_under_a_writer(tmp_path):
    segments(tmp_path)
    writer = SegmentStore(tmp_path, SPEC, segment_bytes=10**9)
    beside = SegmentStore(tmp_path, SPEC, segment_bytes=10**9)
    with pytest.raises(ValueError, match="another command writes this cache"):
        printing(collect_garbage, CacheGcConfig(targets=str(tmp_path)))
    writer.close()
    beside.close()
    assert "0 bytes freed" in printing(collect_garbage, CacheGcConfig(targets=str(tmp_path)))


def test_two_writers_of_one_clip_keep_it_once(tmp_path):
    target = codec.encode(torch.ones(1, 5, 8), "int8")[0]
    writers = [SegmentStore(tmp_path, SPEC, segment_bytes=10**9) for _ in range(2)]
    for writer in writers:
        writer.add({b"d" * 32: target})
    for writer in writers:
        writer.close()
    assert len(TargetCache(tmp_path)) == 1


def test_stats(root, capsys):
    (root / "left-over").write_bytes(b"0" * 77)
    show_stats(CacheStatsConfig(targets=str(root), json_=True))
    facts = json.loads(capsys.readouterr().out)
    cache = TargetCache(root)
    assert (facts["targets"], facts["views"], facts["target_dtype"], facts["data_seed"]) == (
        len(cache),
        2,
        "int8",
        5,
    )
    assert (facts["unlisted_files"], facts["unlisted_bytes"]) == (1, 77)
    show_stats(CacheStatsConfig(targets=str(root)))
    assert cache.spec.fingerprint[:16] in capsys.readouterr().out.replace("\n", "")
