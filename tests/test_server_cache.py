"""salt-serve cache: damage of every kind is named and put right, and what nobody needs goes."""

import io
import json
import os
import re
import shutil

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
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.targets import codec, growing_cache
from salt_distill.common.targets.cache_file import CacheFile
from salt_distill.common.targets.growing_cache import GrowingCache
from salt_distill.common.targets.manifest import MANIFEST, CacheSpec, FileListing, Manifest
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.teacher_server.cache.commands import collect_garbage, show_stats, verify
from salt_distill.teacher_server.precompute import precompute

SPEC = CacheSpec(
    teacher=TeacherSpec(
        name="t",
        fingerprint="f" * 64,
        compute={"device": "cpu"},
        clip_shape=(2, 8, 8, 3),
        grid=(1, 1, 5),
        width=8,
        num_parameters=1,
    ),
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
    row = CacheFile(path, TargetCache(root).spec).row(3)
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
        flip(root / MANIFEST, (root / MANIFEST).read_bytes().index(b'"rows"') + 2)
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
    all_of_the_file = len(CacheFile(a_file(root), TargetCache(root).spec))
    # an unreadable footer leaves no row to keep
    assert f"{computed} targets computed again" in printed or (
        part == "footer" and f"{all_of_the_file} targets computed again" in printed
    )
    assert {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()} == made
    assert "nothing is damaged" in printing(verify, CacheVerifyConfig(targets=str(root)))


def test_a_missing_file_a_pipe_in_its_place_and_a_lost_manifest(root, made, shards, ckpt):
    missing, pipe, *_ = sorted(root.rglob("*.arrow"))
    for path in (missing, pipe):
        path.unlink()
    os.mkfifo(pipe)
    (root / MANIFEST).write_text("{")
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
    writer = GrowingCache(root, SPEC, segment_bytes=10**9)
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
    left_over = [
        tmp_path / "segments" / ".partial-0123abcd-8.arrow",
        tmp_path / "segments" / "0123abcd-7.arrow",
    ]
    for path in left_over:
        path.write_bytes(b"0" * 1000)
    size = next(tmp_path.rglob("*-2.arrow")).stat().st_size
    config = {"targets": str(tmp_path), "max_bytes": 2 * size + 100}
    assert "would be freed" in printing(collect_garbage, CacheGcConfig(**config, dry_run=True))
    assert len(TargetCache(tmp_path)) == 12
    assert all(path.exists() for path in left_over)
    printed = printing(collect_garbage, CacheGcConfig(**config))
    assert "not in the manifest: segments/0123abcd-7.arrow" in printed
    cache = TargetCache(tmp_path)
    assert len(cache) == 8
    assert cache.find(bytes([0, 0]) * 16) is None
    assert sorted(path.name[-8:] for path in tmp_path.rglob("*.arrow")) == ["-1.arrow", "-2.arrow"]


def test_gc_removes_nothing_that_is_not_the_caches(tmp_path):
    root, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    segments(root)
    elsewhere.mkdir()
    (elsewhere / "0123abcd-7.arrow").write_text("of others")
    (root / ("f" * 64)).mkdir()
    (root / ("f" * 64) / "view-0").symlink_to(elsewhere)
    (root / "segments" / "0123abcd-8.arrow").symlink_to(elsewhere / "0123abcd-7.arrow")
    others = [root / "notes.txt", root / "segments" / "notes.arrow", elsewhere / "0123abcd-7.arrow"]
    for path in others[:2]:
        path.write_text("of others")
    said = printing(collect_garbage, CacheGcConfig(targets=str(root), max_bytes=1))
    assert all(path.read_text() == "of others" for path in others)
    assert "not of a cache, and left alone: notes.txt" in said
    assert (root / "segments" / "0123abcd-8.arrow").is_symlink()
    assert not list(root.rglob("*-[012].arrow"))


@pytest.mark.parametrize("name", ["segments/../../x", "../x", "/etc/x.arrow", "segments/x", "notes.txt"])
def test_a_manifest_lists_nothing_outside_of_its_folder(tmp_path, name):
    root = tmp_path / "cache"
    segments(root)
    (tmp_path / "x").write_text("of others")
    manifest = Manifest.read(root)
    manifest.model_copy(update={"files": {name: FileListing(rows=1, sha256="0")}}).write(root)
    for command in (collect_garbage, verify):
        config = CacheGcConfig if command is collect_garbage else CacheVerifyConfig
        with pytest.raises(codec.CorruptTargetError, match="damaged"):
            printing(command, config(targets=str(root)))
    assert (tmp_path / "x").exists()


def test_a_folder_with_other_things_in_it_is_no_cache(tmp_path, shards, ckpt):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "thesis.tex").write_text("of others")
    with pytest.raises(ValueError, match=r"has thesis\.tex in it, expected an empty folder"):
        GrowingCache(tmp_path, SPEC, segment_bytes=1)
    config = PrecomputeConfig(ckpt=str(ckpt), data=str(shards), out=str(tmp_path), views=1, workers=0)
    with pytest.raises(ValueError, match=r"has thesis\.tex in it"):
        printing(precompute, config)
    (tmp_path / "thesis.tex").unlink()
    GrowingCache(tmp_path, SPEC, segment_bytes=1).close()


def test_a_file_that_is_cut_while_it_is_read_is_named_and_harms_nobody(tmp_path, caplog):
    kept = segments(tmp_path, count=2)
    first, second = bytes([0, 1]) * 16, bytes([1, 1]) * 16
    reader, growing = TargetCache(tmp_path), GrowingCache(tmp_path, SPEC, segment_bytes=10**9)
    path = next(tmp_path.rglob("*-0.arrow"))
    with path.open("r+b") as file:
        file.truncate(0)
    for read in (
        lambda: list(reader.targets([first])),
        lambda: reader.find(first),
        lambda: growing.find(first),
    ):
        with pytest.raises(codec.CorruptTargetError, match=r"-0\.arrow: it cannot be read any more"):
            read()
    assert bytes(growing.find(second).target) == bytes(kept[second].target)
    with pytest.raises(codec.CorruptTargetError, match="1 of its files are damaged"):
        printing(verify, CacheVerifyConfig(targets=str(tmp_path)))
    growing.add({first: kept[first]})
    growing.close()

    again = GrowingCache(tmp_path, SPEC, segment_bytes=10**9)
    assert "-0.arrow: got no readable cache file" in caplog.text
    assert again.num_left_out == 4
    assert bytes(again.find(first).target) == bytes(kept[first].target)
    assert again.find(bytes([0, 2]) * 16) is None
    again.close()


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"[" * 100_000, b'{"format": 1}', b"\xff"])
def test_a_damaged_manifest_is_made_again_from_whole_segments(tmp_path, caplog, damage):
    kept = segments(tmp_path, count=2)
    running = GrowingCache(tmp_path, SPEC, segment_bytes=10**9)
    next(tmp_path.rglob("*-0.arrow")).write_bytes(b"0" * 100)
    (tmp_path / MANIFEST).write_bytes(damage)
    lost = bytes([0, 1]) * 16
    running.add({lost: kept[lost], b"n" * 32: kept[lost]})
    running.seal()
    assert "it was made again from 1 whole segments" in caplog.text
    (tmp_path / MANIFEST).write_bytes(damage)
    with pytest.raises(codec.CorruptTargetError, match="2 of its files are damaged"):
        printing(verify, CacheVerifyConfig(targets=str(tmp_path)))
    started = GrowingCache(tmp_path, SPEC, segment_bytes=10**9)
    assert started.find(b"n" * 32) is not None
    for digest, encoded in kept.items():
        if digest[0] == 1 or digest == lost:
            assert bytes(started.find(digest).target) == bytes(encoded.target)
    started.close()
    running.close()


def test_a_folder_that_was_removed_is_not_written_beside(tmp_path):
    root = tmp_path / "cache"
    kept = segments(root, count=1)
    growing = GrowingCache(root, SPEC, segment_bytes=10**9)
    shutil.rmtree(root)
    growing.add({b"n" * 32: next(iter(kept.values()))})
    with pytest.raises(OSError, match="No such file"):
        growing.close()
    assert not root.exists()


def test_partial_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path, monkeypatch):
    """A replica that is killed is replaced while another one lives, and both write to one folder."""
    kept = segments(tmp_path, count=1)
    folder, while_writing = tmp_path / "segments", []
    (folder / ".partial-0123abcd-0.arrow").write_bytes(b"half")
    (folder / ".partial-0123abcd-1.arrow").symlink_to(tmp_path / "nowhere")
    (tmp_path / f".partial-{MANIFEST}").write_bytes(b"half")
    living = GrowingCache(tmp_path, SPEC, segment_bytes=10**9)
    assert not [*folder.glob(".*"), *tmp_path.glob(".*")]
    (folder / ".partial-0123abcd-2.arrow").write_bytes(b"half")
    real = growing_cache.write_rows

    def meanwhile(partial, *values):
        num_rows = real(partial, *values)
        GrowingCache(tmp_path, SPEC, segment_bytes=10**9).close()
        while_writing.append([path == partial for path in folder.glob(".*")])
        return num_rows

    monkeypatch.setattr(growing_cache, "write_rows", meanwhile)
    living.add({b"n" * 32: next(iter(kept.values()))})
    living.close()
    assert while_writing == [[True]]
    assert TargetCache(tmp_path).undamaged(b"n" * 32) is not None
    assert not list(folder.glob(".*"))


def test_nothing_is_removed_under_a_writer(tmp_path):
    segments(tmp_path)
    writer = GrowingCache(tmp_path, SPEC, segment_bytes=10**9)
    beside = GrowingCache(tmp_path, SPEC, segment_bytes=10**9)
    with pytest.raises(ValueError, match="another command writes this cache"):
        printing(collect_garbage, CacheGcConfig(targets=str(tmp_path)))
    writer.close()
    beside.close()
    assert "0 bytes freed" in printing(collect_garbage, CacheGcConfig(targets=str(tmp_path)))


def test_two_writers_of_one_clip_keep_it_once(tmp_path):
    target = codec.encode(torch.ones(1, 5, 8), "int8")[0]
    writers = [GrowingCache(tmp_path, SPEC, segment_bytes=10**9) for _ in range(2)]
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
