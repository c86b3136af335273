"""The index: of tars that others packed, and as a value that knows its content."""

import io
import json
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from pack_tools import VIDEO, encoded_image, grey_video, new_reader, packed, samples_of, skipped

from salt_distill.common.data.index import SCHEMA, index_hash, load_index
from salt_distill.common.data.shards import open_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def test_tars_of_webdatasets_own_writer(tmp_path):
    """Its usual forms: numbers as classes, text and JSON beside the video, images, keys that start anew in
    every tar."""
    (tmp_path / "theirs").mkdir()
    videos = [grey_video(*range(number, 60 + number, 5)) for number in range(0, 150, 30)]
    image = encoded_image(PIXELS, "JPEG")
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / "theirs" / f"part-{number:04d}.tar")) as writer:
            writer.write({"__key__": "000000", "mp4": videos[2 * number], "cls": number, "txt": "a caption"})
            writer.write(
                {"__key__": "000001", "mp4": videos[2 * number + 1], "json": {"caption": "theirs", "fps": 99}}
            )
    with webdataset.TarWriter(str(tmp_path / "theirs" / "part-0002.tar")) as writer:
        writer.write({"__key__": "n01/n01_10026", "jpg": image, "cls": 7})
        writer.write({"__key__": "text", "txt": "alone"})
        writer.write({"__key__": "bad", "mp4": b"no video", "cls": 0})
        writer.write({"__key__": "two.dots", "mp4": videos[4]})
        writer.write({"__key__": "frames", "000.jpg": image, "001.jpg": image})
    samples, dataset = samples_of(tmp_path / "theirs"), open_dataset(tmp_path / "theirs")
    expected = {f"theirs/part-{number // 2:04d}/{number % 2:06d}": videos[number] for number in range(4)} | {
        "theirs/part-0002/n01/n01_10026": image
    }
    assert {key: dataset.read(sample) for key, sample in samples.items()} == expected
    assert {key: sample.labels for key, sample in samples.items() if sample.labels} == {
        "theirs/part-0000/000000": {"class": 0},
        "theirs/part-0001/000000": {"class": 1},
        "theirs/part-0002/n01/n01_10026": {"class": 7},
    }
    assert {sample.fps for sample in samples.values()} == {5, 1}
    assert all(sample.sha256 == sha256(expected[key]).hexdigest() for key, sample in samples.items())
    assert dataset.class_names == {"class": [str(number) for number in range(8)]}
    assert skipped(tmp_path / "theirs") == {
        "bad": "it is no video that FFmpeg can open (Invalid data found when processing input)",
        "two": "its video ends in .dots.mp4, expected one dot in the name, as in 000001.mp4",
        "frames": (
            "it is numbered images whose rate no sidecar states, expected what `salt-data pack --images"
            " frames` writes"
        ),
    }
    assert new_reader(tmp_path / "theirs").clips(range(5)).good.all()


def test_our_shards_beside_others_keep_their_sidecars(shards, tmp_path):
    """Shards may be copied from one folder to another, index or not."""
    (tmp_path / "some").mkdir()
    for tar in sorted(shards.glob("*.tar"))[:2]:
        (tmp_path / "some" / tar.name).write_bytes(tar.read_bytes())
    some, whole = samples_of(tmp_path / "some"), samples_of(shards)
    assert 0 < len(some) < len(whole)
    assert all(whole[key] == sample for key, sample in some.items())


def test_a_frame_out_of_place_is_named(tmp_path):
    packed_frames = tmp_path / "out"
    for number in range(3):
        (tmp_path / "v" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / "a" / f"{number}.png").write_bytes(encoded_image(PIXELS + np.uint8(number)))
    packed(tmp_path / "v", packed_frames, images="frames", fps=5)
    with tarfile.open(packed_frames / "v-000000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    (tmp_path / "torn").mkdir()
    with tarfile.open(tmp_path / "torn" / "v-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in [
            members[0],
            members[3],
            *members[1:3],
            ("00000001.mp4", VIDEO),
        ]:  # the sidecar between frames
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert set(samples_of(tmp_path / "torn")) == {"torn/v-000000/00000001"}
    assert skipped(tmp_path / "torn") == {
        "00000000": "its frame 00000000.000001.png does not follow the frame before it in the tar"
    }


# --- the hash ---


@pytest.fixture
def rows(shards) -> list[dict]:
    return load_index(shards)[1].to_pylist()


def test_the_hash_knows_only_the_content(rows, tmp_path):
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    cut = pa.concat_tables([table.slice(0, 3), table.slice(3, 0), table.slice(3)])
    pq.write_table(table, tmp_path / "small.parquet", row_group_size=7)
    for same in (
        cut,
        table.combine_chunks(),
        cut.slice(0),
        pq.read_table(tmp_path / "small.parquet", schema=SCHEMA),
    ):
        assert index_hash(same) == index_hash(table)
    assert index_hash(table.slice(2, 9)) == index_hash(pa.Table.from_pylist(rows[2:11], schema=SCHEMA))


@pytest.mark.parametrize("column", SCHEMA.names)
def test_the_hash_changes_with_every_column(rows, column):
    before = index_hash(pa.Table.from_pylist(rows, schema=SCHEMA))
    value = rows[5][column]
    rows[5][column] = (
        value[:-1] if isinstance(value, str | list) else not value if isinstance(value, bool) else value + 1
    )
    assert index_hash(pa.Table.from_pylist(rows, schema=SCHEMA)) != before


def test_text_that_moves_from_one_row_to_the_next_changes_the_hash(rows):
    before = index_hash(pa.Table.from_pylist(rows, schema=SCHEMA))
    rows[0]["codec"], rows[1]["codec"] = rows[0]["codec"] + rows[1]["codec"][0], rows[1]["codec"][1:]
    assert index_hash(pa.Table.from_pylist(rows, schema=SCHEMA)) != before


def test_an_index_that_was_changed_is_refused(shards, rows, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "dataset.json").write_text((shards / "dataset.json").read_text())
    rows[0]["labels"] = (
        [("digit", 3), ("motion", 0)] if rows[0]["labels"] != [("digit", 3), ("motion", 0)] else []
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "toy" / "index.parquet")
    with pytest.raises(ValueError, match=r"index\.parquet is not the one that dataset\.json describes"):
        load_index(tmp_path / "toy")


def test_the_description_says_what_is_there(shards):
    info = json.loads((shards / "dataset.json").read_text())
    assert (info["name"], info["kind"], info["num_samples"], info["splits"]) == (
        "toy",
        "packed",
        50,
        {"test": 10, "train": 40},
    )
    assert info["num_shards"] == len(list(Path(shards).glob("*.tar")))
