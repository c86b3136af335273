"""Decoding real and damaged videos, the evaluation view, and what pack and the index refuse."""

import csv
import io
import shutil
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import rich.console
from PIL import Image

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import LoaderConfig, PackConfig, SynthConfig, ViewConfig
from salt_distill.common.data import video
from salt_distill.common.data.encode import FAST_DECODING, encode_mp4
from salt_distill.common.data.making.pack import pack
from salt_distill.common.data.making.synth import MOTIONS, moving_digit
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.skipped import read_skipped
from salt_distill.common.data.video import decode, probe

NUM_FRAMES = 12


@pytest.fixture(scope="module")
def ramp() -> bytes:
    """A video whose frame i is grey 20 i."""
    grey = [np.full((16, 32, 3), 20 * i, np.uint8) for i in range(NUM_FRAMES)]
    return encode_mp4(
        [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in grey],
        width=32,
        height=16,
        fps=5,
        crf=8,
    )


def pack_quietly(src: Path, out: Path) -> None:
    pack(PackConfig(src=str(src), out=str(out), workers=1), rich.console.Console(quiet=True))


# --- decoding ---


@pytest.mark.parametrize("options", [{}, FAST_DECODING], ids=["small", "fast"])
def test_the_same_frames_give_the_same_bytes(options):
    """See encode.py, Note [the same bytes]: with libx264's defaults most of such clips fail."""
    for clip in range(4):
        ground = np.random.default_rng(clip).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(ground).resize((500, 300)))
        frames = [np.ascontiguousarray(picture[t : t + 256, 2 * t : 2 * t + 456]) for t in range(16)]
        encodings = {
            encode_mp4(
                [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames],
                width=456,
                height=256,
                fps=8,
                crf=20,
                options=options,
            )
            for _ in range(6)
        }
        assert len(encodings) == 1


def test_facts_of_a_video(ramp):
    assert probe(ramp) == video.VideoFacts(
        num_frames=NUM_FRAMES, fps=5.0, width=32, height=16, duration_s=2.4, codec="h264"
    )


def test_frames_come_as_asked_for(ramp):
    frames = decode(ramp, [7, 0, 7, 11])
    assert frames.shape == (4, 16, 32, 3)
    assert np.abs(frames.mean((1, 2, 3)) - [140, 0, 140, 220]).max() < 4


def test_a_frame_that_is_not_there_is_an_error(ramp):
    with pytest.raises(BadVideoError, match="12"):
        decode(ramp, [3, NUM_FRAMES])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"some text\n" * 100, "no video that FFmpeg can open"),
        (
            (
                b"RIFF\x24\0\0\0WAVEfmt"
                b" \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data\x04\0\0\0\0\0\0\0"
            ),
            "no video stream",
        ),
    ],
)
def test_what_is_no_video_has_a_reason(data, reason):
    with pytest.raises(BadVideoError, match=reason):
        probe(data)


def test_a_playlist_opens_no_other_file(ramp, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(ramp)
    for playlist in (
        f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n",
        f"#EXTM3U\n#EXTINF:10,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
    ):
        with pytest.raises(BadVideoError):
            probe(playlist.encode())


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "num_frames", "size"),
    [
        ("mdnassets__flower.webm", 150, (960, 540)),  # states no frame count
        ("torchcodec__nasa_13013.mp4", 390, (480, 270)),  # two video streams: the better one
        ("torchcodec__nasa_13013_rotated.mp4", 17, (270, 480)),
        ("torchcodec__nasa_13013_vfr.mp4", 50, (480, 270)),
        ("torchcodec__testsrc2_odd_height_and_width_vp9.mp4", 25, (321, 241)),
        ("torchcodec__testsrc2_av1_10bit.mp4", 25, (320, 240)),
        ("moviepy__pigs_in_a_polka.gif", 30, (314, 273)),
    ],
)
def test_real_videos_have_the_known_facts(shared_videos, name, num_frames, size):
    data = (shared_videos / name).read_bytes()
    facts = probe(data)
    assert (facts.num_frames, (facts.width, facts.height)) == (num_frames, size)
    assert decode(data, [0, num_frames - 1]).shape == (2, size[1], size[0], 3)


@pytest.mark.needs_data
@pytest.mark.parametrize("name", ["videos/torchcodec__nasa_13013_rotated.mp4", "bad/decord__video_90.mov"])
def test_rotated_videos_come_upright(shared_videos, name):
    data = (shared_videos.parent / name).read_bytes()
    with av.open(io.BytesIO(data)) as container:
        stored = next(container.decode(video=0))
    assert abs(stored.rotation) == 90  # counter-clockwise, as np.rot90 turns
    assert np.array_equal(
        decode(data, [0])[0], np.rot90(stored.to_ndarray(format="rgb24"), stored.rotation // 90)
    )


@pytest.mark.needs_data
def test_a_video_that_breaks_in_the_middle_is_bad(shared_bad):
    data = (shared_bad / "decord__corrupted.mp4").read_bytes()
    with pytest.raises(BadVideoError, match="decoding fails after 28 frames"):
        probe(data)


# --- the evaluation view ---


def test_evaluation_takes_the_middle(shards):
    view = ViewConfig(num_frames=4, frame_step=2, crop_size=40)  # the size of the videos: nothing is resized
    reader = Reader(str(shards), data_seed=0, views="fresh", view=view, split="test", loader=LoaderConfig())
    samples = [sample for shard in reader.samples for sample in shard]
    batch = reader.evaluation(samples)
    assert batch.good.all()
    assert len(batch.keys) == 10
    for sample, clip in zip(samples, batch.pixels, strict=True):
        assert np.array_equal(clip, decode(reader.dataset.read(sample), [3, 5, 7, 9]))  # of 12


# --- what pack refuses ---


def test_pack_replaces_nothing_but_its_own(synth_videos, tmp_path):
    out = tmp_path / "out"
    pack_quietly(synth_videos, out)
    (out / "notes.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"something else than shards of this command \(notes\.txt\)"):
        pack_quietly(synth_videos, out)
    assert (out / "notes.txt").exists()


def test_pack_does_not_replace_shards_that_others_packed(ramp, synth_videos, tmp_path):
    theirs = tmp_path / "theirs"
    foreign_tar(theirs / "part-000000.tar", {"a.mp4": ramp})
    open_dataset(theirs)  # writes an index beside their tar
    with pytest.raises(ValueError, match="something else than shards of this command"):
        pack_quietly(synth_videos, theirs)
    assert (theirs / "part-000000.tar").exists()


def test_a_killed_pack_is_made_anew(synth_videos, shards, tmp_path):
    (tmp_path / ".partial-toy").mkdir()
    (tmp_path / ".partial-toy" / "toy-000099.tar").write_bytes(b"half")
    pack(
        PackConfig(src=str(synth_videos), out=str(tmp_path / "toy"), max_shard_bytes=60_000, workers=1),
        rich.console.Console(quiet=True),
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()} == {
        path.name: path.read_bytes() for path in shards.iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def write_table(folder: Path, rows: list[tuple[str, ...]]) -> Path:
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "table.csv"


def test_a_csv_names_classes_and_may_leave_cells_empty(ramp, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(ramp)
    table = write_table(
        tmp_path,
        [("path", "action"), ("a.mp4", "wave"), ("b.mp4", ""), ("c.mp4", "clap"), ("gone.mp4", "wave")],
    )
    pack_quietly(table, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    samples = [sample for shard in dataset.samples("all") for sample in shard]
    assert dataset.class_names == {"action": ["clap", "wave"]}
    assert sorted((sample.key, sample.labels) for sample in samples) == [
        ("table/a.mp4", {"action": 1}),
        ("table/b.mp4", {}),
        ("table/c.mp4", {"action": 0}),
    ]
    assert "gone.mp4" in (tmp_path / "out" / "skipped.csv").read_text()


def test_a_csv_with_a_short_row_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="line 3 has not as many cells as the header"):
        pack_quietly(
            write_table(tmp_path, [("path", "action"), ("a.mp4", "wave"), ("b.mp4",)]), tmp_path / "out"
        )


# --- the index of tars that others packed ---


def foreign_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_a_foreign_sample_that_cannot_be_read_is_named(ramp, tmp_path, caplog):
    members = {
        "good.mp4": ramp,
        "good.cls": b"2\n",
        "odd.mp4": ramp,
        "odd.cls": b"wave",
        "torn.mp4": ramp,
        "torn.json": b"{",
    }
    foreign_tar(tmp_path / "theirs" / "a.tar", members)
    dataset = open_dataset(tmp_path / "theirs")
    assert [(sample.key, sample.labels) for shard in dataset.samples("all") for sample in shard] == [
        ("theirs/a/good", {"class": 2})
    ]
    assert "a.tar/odd out of the index: its .cls holds b'wave'" in caplog.text
    assert "a.tar/torn out of the index: its .json is not JSON" in caplog.text
    assert [path for path, _ in read_skipped(tmp_path / "theirs")] == ["a.tar/odd", "a.tar/torn"]


def test_a_torn_tar_is_named(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "toy")
    (tmp_path / "toy" / "dataset.json").unlink()
    torn = sorted((tmp_path / "toy").glob("*.tar"))[0]
    torn.write_bytes(torn.read_bytes()[:700])
    with pytest.raises(ValueError, match=rf"{torn.name}: got no whole tar"):
        open_dataset(tmp_path / "toy")


def test_an_index_made_anew_is_the_same(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "toy")
    (tmp_path / "toy" / "dataset.json").unlink()
    (tmp_path / "toy" / "index.parquet").unlink()
    assert open_dataset(tmp_path / "toy").index_hash == open_dataset(shards).index_hash


# --- videos made here ---


def test_where_the_digit_is_in_one_frame_does_not_tell_its_motion():
    config, rng = SynthConfig(out="unused"), np.random.default_rng(0)
    places, motions = [], []
    for number in range(600):
        frames, _, motion = moving_digit(config, "train", number)
        moving = np.square(np.abs(frames - np.median(frames, 0)).sum(-1))[rng.integers(config.num_frames)]
        y, x = np.indices(moving.shape)
        places.append(((x * moving).sum() / moving.sum(), (y * moving).sum() / moving.sum()))
        motions.append(MOTIONS.index(motion))
    known, asked, labels = np.array(places[:450]), np.array(places[450:]), np.array(motions)
    nearest = np.argsort(((asked[:, None] - known) ** 2).sum(-1), axis=1)[:, :30]
    votes = np.array([np.bincount(row, minlength=len(MOTIONS)).argmax() for row in labels[:450][nearest]])
    assert (votes == labels[450:]).mean() < 0.3  # chance: 0.125; both ends of the path give all eight away
