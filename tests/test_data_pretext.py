"""Labels made from the clips themselves, checked frame by frame."""

import csv
import io
from collections import Counter

import av
import numpy as np
import pytest

from salt_distill.common.config import PretextConfig
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.making.pretext import KINDS, make_pretext
from salt_distill.common.data.skipped import read_skipped
from salt_distill.common.data.video import upright_frames
from tests.pack_tools import packed, samples_of

NUM_FRAMES = 60
VALUES_PER_FRAME = 4
"""Frame number k of a video is grey of the value 4 k: a clip's frames say which they are."""
CUT = 42
"""The first frame of the last 0.3."""
NUM_VIDEOS = 48
"""More than clips, where a video is to give few."""
LABELS = ("arrow", "speed", "order")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    videos = tmp_path_factory.mktemp("pretext")
    (videos / "deep").mkdir()
    for name in ("a.mp4", "deep/b.mp4"):
        (videos / name).write_bytes(_video(range(0, NUM_FRAMES * VALUES_PER_FRAME, VALUES_PER_FRAME)))
    (videos / "short.mp4").write_bytes(_video(range(20)))
    (videos / "still.mp4").write_bytes(_video([90] * NUM_FRAMES))
    (videos / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    out = videos.parent / f"{videos.name}-clips"
    make_pretext(_config(videos, out))
    return videos, out


def test_each_label_is_what_the_frames_say(clips):
    _, out = clips
    for row in _rows(out):
        shown = [
            round(float(frame.mean()) / VALUES_PER_FRAME)
            for frame in upright_frames((out / row["path"]).read_bytes())
        ]
        steps = np.diff(shown)
        step = int(row["speed"].rstrip("x")) * (1 if row["arrow"] == "forward" else -1)
        assert len(shown) == 4
        assert steps[0] == steps[2] == step
        assert (steps[1] == step) == (row["order"] == "kept")
        assert (min(shown) >= CUT) if row["split"] == "test" else (max(shown) < CUT)


def test_no_label_follows_from_the_video(clips):
    _, out = clips
    rows = _rows(out)
    labelled = Counter(
        (row["split"], row["origin"], row["arrow"], row["speed"], row["order"])
        for row in rows
        if row["split"] != "pretrain"
    )
    assert len(labelled) == 2 * 2 * len(KINDS)  # splits, videos
    assert set(labelled.values()) == {1}
    as_filmed = [row for row in rows if row["split"] == "pretrain"]
    assert len(as_filmed) == 6
    assert {(row["arrow"], row["speed"], row["order"]) for row in as_filmed} == {("forward", "1x", "kept")}


def test_many_videos_with_few_clips_give_all_classes(tmp_path):
    _write_copies(_video(range(0, NUM_FRAMES * VALUES_PER_FRAME, VALUES_PER_FRAME)), tmp_path / "videos")
    make_pretext(
        _config(tmp_path / "videos", tmp_path / "clips", num_train=2 * NUM_VIDEOS, num_test=NUM_VIDEOS)
    )
    rows = _rows(tmp_path / "clips")
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    of_test = {row["origin"]: row for row in test}
    firsts = {f"train/{number:02d}-00000.mp4" for number in range(NUM_VIDEOS)}
    for label in LABELS:
        assert sorted(Counter(row[label] for row in train).values()) == [NUM_VIDEOS, NUM_VIDEOS]
        assert sorted(Counter(row[label] for row in test).values()) == [NUM_VIDEOS // 2, NUM_VIDEOS // 2]
        assert len({(row["origin"], row[label]) for row in train}) == 2 * NUM_VIDEOS  # a video's two differ
        alike = sum(row[label] == of_test[row["origin"]][label] for row in train if row["path"] in firsts)
        assert 0.25 < alike / NUM_VIDEOS < 0.75  # by place, the training clips do not tell the test clip's


def test_classes_are_balanced_where_most_windows_are_still(tmp_path):
    moving = range(90, 90 + 24 * VALUES_PER_FRAME, VALUES_PER_FRAME)
    _write_copies(_video([*[90] * (NUM_FRAMES - 24), *moving]), tmp_path / "videos")
    make_pretext(_config(tmp_path / "videos", tmp_path / "clips", num_train=9 * NUM_VIDEOS, num_test=12))
    rows = [row for row in _rows(tmp_path / "clips") if row["split"] == "train"]
    of_video = Counter(row["origin"] for row in rows)
    assert len(set(of_video.values())) > 2
    assert max(of_video.values()) <= 9
    for label in LABELS:
        counts = Counter(row[label] for row in rows)
        assert len(counts) == 2
        assert min(counts.values()) > 0.4 * len(rows)


def test_labels_of_one_class_are_said(clips, tmp_path, capsys):
    videos, _ = clips
    make_pretext(_config(videos, tmp_path / "clips", num_test=1))
    said = capsys.readouterr().err
    assert "test: 1 clips with fewer than two classes of arrow, speed, order, origin, which can" in said
    assert "give a larger --num-test" in said
    assert "train: " not in said


def test_what_gives_no_clip_is_named(clips):
    videos, out = clips
    skipped = dict(read_skipped(out))
    assert {path.removeprefix(f"{videos}/") for path in skipped} == {"short.mp4", "still.mp4", "noise.mp4"}
    assert "20 frames, expected 28 or more" in skipped[str(videos / "short.mp4")]
    assert "nothing moves" in skipped[str(videos / "still.mp4")]
    lonely = out.parent / "lonely"
    lonely.mkdir()
    (lonely / "still.mp4").write_bytes((videos / "still.mp4").read_bytes())
    with pytest.raises(
        ValueError, match=r"none of the 1 videos .* gives a clip, expected videos of at least 28"
    ):
        make_pretext(_config(lonely, out.parent / "none"))
    with pytest.raises(ValueError, match="not empty, expected a new folder"):
        make_pretext(_config(videos, out))


def test_the_same_clips_again_and_packed(clips):
    videos, out = clips
    again = out.parent / "again"
    make_pretext(_config(videos, again))
    assert {path.name: path.read_bytes() for path in again.rglob("*.mp4")} == {
        path.name: path.read_bytes() for path in out.rglob("*.mp4")
    }
    assert "38 videos (6 pretrain, 16 test, 16 train)" in packed(out, out.parent / "shards")
    assert len(samples_of(out.parent / "shards", "train")) == 16


def _config(videos, out, **counts: int) -> PretextConfig:
    values = {"num_pretrain": 9, "num_train": 24, "num_test": 24, "num_frames": 4, "size": 32} | counts
    return PretextConfig.model_validate({"src": str(videos), "out": str(out)} | values)


def _write_copies(video: bytes, folder) -> None:
    folder.mkdir()
    for number in range(NUM_VIDEOS):
        (folder / f"{number:02d}.mp4").write_bytes(video)


def _video(values) -> bytes:
    frames = [
        av.VideoFrame.from_ndarray(np.full((40, 60, 3), value, np.uint8), format="rgb24") for value in values
    ]
    return encode_mp4(frames, width=60, height=40, fps=25, crf=0, pix_fmt="yuv444p")


def _rows(out) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "labels.csv").read_text())))
