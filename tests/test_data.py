"""Order, views, packing, reading and the videos made here: from files to the same clips every time."""

import csv
import io
import json
import math
import shutil
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pydantic
import pytest
import rich.console
import torch
import torch.nn.functional as F
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_distill.common.clip import clip_digest
from salt_distill.common.config import DrawConfig, LoaderConfig, PackConfig, SynthConfig, ViewConfig
from salt_distill.common.data import views
from salt_distill.common.data.making.pack import pack
from salt_distill.common.data.making.synth import MOTIONS, moving_digit
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.shards import open_dataset

VIEW = ViewConfig(num_frames=4, frame_step=2, crop_size=24)


def packed(src: Path, out: Path, **config) -> str:
    """Packs, and gives back what was printed."""
    printed = io.StringIO()
    pack(
        PackConfig(src=str(src), out=str(out), **{"workers": 1, **config}),
        rich.console.Console(file=printed, width=1000),
    )
    return printed.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def skipped_names(out: Path) -> set[str]:
    with (out / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["reason"] for row in rows)
    return {Path(row["path"]).name for row in rows}


def new_reader(data: Path, *, view: ViewConfig = VIEW, **loader) -> Reader:
    return Reader(
        str(data), data_seed=0, views="fresh", view=view, split="train", loader=LoaderConfig(**loader)
    )


# --- views ---


def test_draw_is_the_recorded_one():  # DESIGN section 4, View: any change here gives every run other clips
    draw = views.draw(0, "a/b", 0)
    assert (draw.start, draw.flip, len(draw.tries)) == (0.972679374836094, 0.703096798770808, 10)
    assert draw.tries[0] == views.BoxTry(
        area=0.7586993750377098,
        ratio=0.5439179737824448,
        top=0.6773237710675146,
        left=0.6342835205023002,
    )


def test_draws_differ_by_seed_key_and_view():
    names = [(0, "a/b", 0), (1, "a/b", 0), (0, "a/c", 0), (0, "a/b", 1)]
    assert len({views.draw(*name) for name in names}) == 4


def test_pinned_views_repeat_and_fresh_ones_do_not():
    assert [views.view_number("fresh", epoch) for epoch in range(5)] == [0, 1, 2, 3, 4]
    assert [views.view_number(2, epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_crop_is_inside_the_frame(height, width, number):
    top, left, crop_h, crop_w = views.crop_box(
        ViewConfig(), height, width, views.draw(0, "source/name", number)
    )
    assert crop_h >= 1
    assert crop_w >= 1
    assert 0 <= top <= top + crop_h <= height
    assert 0 <= left <= left + crop_w <= width


def test_the_first_try_that_fits_is_the_crop_and_else_the_largest_centred_box():
    too_wide = views.BoxTry(area=0.99, ratio=0.99, top=0.0, left=0.0)  # 230 of 200 pixels
    fits, also = (views.BoxTry(area=0.1, ratio=0.5, top=0.5, left=place) for place in (0.5, 0.0))

    def box(view: ViewConfig, height: int, width: int, *tries: views.BoxTry) -> tuple[int, int, int, int]:
        return views.crop_box(view, height, width, views.Draw(start=0.0, flip=0.0, tries=tries))

    view = ViewConfig()
    assert box(view, 200, 200, too_wide, fits, also) == box(view, 200, 200, fits) != box(view, 200, 200, also)
    assert box(view, 200, 200, too_wide) == (0, 0, 200, 200)  # its ratio is allowed
    impossible = view.model_copy(update={"scale": (2.0, 2.0)})
    assert box(impossible, 90, 161, fits) == (0, 19, 90, 122)  # 90 x 1.35 = 121.5, rounded half to even
    assert box(impossible, 161, 90, fits) == (20, 0, 120, 90)  # 90 / 0.75


def test_crops_have_the_configured_area_and_shape():
    boxes = [
        views.crop_box(ViewConfig(scale=(0.3, 0.5)), 400, 400, views.draw(0, "source/name", number))
        for number in range(200)
    ]
    for _, _, crop_h, crop_w in boxes:
        assert 0.29 <= crop_h * crop_w / 400**2 <= 0.51
        assert 0.74 <= crop_w / crop_h <= 1.36
    wide = ViewConfig.model_validate({"crop_size": "64x128", "scale": (0.1, 0.2)})
    for number in range(50):  # a clip twice as wide as high takes such crops
        _, _, crop_h, crop_w = views.crop_box(wide, 400, 400, views.draw(0, "source/name", number))
        assert 1.47 <= crop_w / crop_h <= 2.73


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_frames_keep_their_step_or_repeat_the_last(num_frames, start):
    idx = views.frame_idx(VIEW, num_frames, start)
    assert len(idx) == 4
    assert 0 <= idx[0] <= idx[-1] < num_frames
    steps = set(np.diff(idx).tolist())
    assert steps == {2} if num_frames >= 7 else idx == [min(2 * i, num_frames - 1) for i in range(4)]


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (65, [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]),
        (64, [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]),
        (30, [0, 5, 10, 15, 20, 25, 29, *[29] * 9]),
        (7, [0] + [6] * 15),
        (3, [2] * 16),
    ],
)
def test_a_window_is_spread_as_in_the_reference(num_frames, expected):  # its loader, run on these lengths
    view = ViewConfig(sampling="window")
    assert views.frame_idx(view, num_frames, 0.0) == expected
    times = np.arange(num_frames) * 512
    assert views.frame_idx(view, num_frames, 0.0, times) == views.frame_idx(view, num_frames, 0.0)


def test_precompute_takes_all_that_decides_a_view_but_its_shape():
    assert set(DrawConfig.model_fields) == set(ViewConfig.model_fields) - {"num_frames", "crop_size"}


def test_windows_start_where_the_reference_lets_them():
    starts = {views.frame_idx(ViewConfig(sampling="window"), 70, share / 100)[0] for share in range(100)}
    assert starts == set(range(6))  # of the seven that fit, the reference draws no last one


@pytest.mark.parametrize(
    ("height", "width", "size"), [(37, 53, (24, 24)), (16, 20, (24, 24)), (100, 24, (18, 30)), (1, 1, (8, 8))]
)
def test_resize_is_bilinear_interpolation(height, width, size):
    frames = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    ours = views.resize(frames, *size)
    exact = F.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).double(),
        size,
        mode="bilinear",
        align_corners=False,
    )
    assert ours.dtype == np.uint8
    assert (
        np.abs(ours - exact.permute(0, 2, 3, 1).numpy()).max() <= 0.5 + 1e-4
    )  # rounded to the nearest, whichever at a tie


def test_resize_to_the_same_size_changes_nothing():
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    assert np.array_equal(views.resize(frames, 24, 24), frames)


def test_flip_mirrors_half_of_the_draws():
    frames = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    whole = ViewConfig(num_frames=4, crop_size=24, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    draws = [views.draw(0, "a/b", number) for number in range(100)]
    flipped = [np.array_equal(views.apply(whole, frames, draw), frames[:, :, ::-1]) for draw in draws]
    assert 35 < sum(flipped) < 65
    assert all(
        np.array_equal(views.apply(whole.model_copy(update={"flip": False}), frames, draw), frames)
        for draw in draws[:10]
    )


# --- pack ---


def test_packing_twice_gives_the_same_bytes(synth_videos, shards, tmp_path):
    packed(synth_videos, tmp_path / "toy", max_shard_bytes=60_000, workers=2)
    assert contents(tmp_path / "toy") == contents(shards)
    packed(synth_videos, tmp_path / "toy", max_shard_bytes=60_000)  # over what is there
    assert contents(tmp_path / "toy") == contents(shards)
    assert len(list(shards.glob("*.tar"))) > 2


def test_labels_and_splits_come_from_the_csv(synth_videos, shards):
    dataset = open_dataset(shards)
    with (synth_videos / "labels.csv").open(newline="") as file:
        rows = {f"toy/{row['path']}": row for row in csv.DictReader(file)}
    samples = [sample for shard in dataset.samples("all") for sample in shard]
    assert {sample.key for sample in samples} == set(rows)
    for sample in samples:
        row = rows[sample.key]
        assert sample.split == row["split"]
        assert {label: dataset.class_names[label][value] for label, value in sample.labels.items()} == {
            label: row[label] for label in ("digit", "motion")
        }
        assert dataset.read(sample) == (synth_videos / row["path"]).read_bytes()


def test_plain_webdataset_reads_the_shards(shards):
    tars = sorted(str(tar) for tar in shards.glob("*.tar"))
    seen = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        facts = json.loads(sample["json"])
        assert sha256(sample["mp4"]).hexdigest() == facts["sha256"]
        seen[facts["key"]] = facts["num_frames"]
    assert seen == {sample.key: 12 for shard in open_dataset(shards).samples("all") for sample in shard}


def test_foreign_tars_get_an_index(synth_videos, tmp_path):
    videos = sorted(synth_videos.glob("*.mp4"))[:4]
    (tmp_path / "theirs").mkdir()
    with tarfile.open(tmp_path / "theirs" / "part-0.tar", "w") as tar:
        for number, video in enumerate([*(video.read_bytes() for video in videos), b"no video"]):
            for suffix, data in ((".mp4", video), (".cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"clip{number}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    dataset = open_dataset(tmp_path / "theirs")
    samples = [sample for shard in dataset.samples("train") for sample in shard]
    assert [sample.key for sample in samples] == [f"theirs/part-0/clip{number}" for number in range(4)]
    assert [sample.labels for sample in samples] == [{"class": number % 3} for number in range(4)]
    assert [dataset.read(sample) for sample in samples] == [video.read_bytes() for video in videos]
    assert open_dataset(tmp_path / "theirs").index_hash == dataset.index_hash
    assert new_reader(tmp_path / "theirs").clips(range(4)).good.all()


@pytest.fixture
def some_bad(synth_videos, tmp_path) -> Path:
    """Four good videos and three bad ones between them."""
    src = tmp_path / "mixed"
    src.mkdir()
    for video in sorted(synth_videos.glob("*.mp4"))[:4]:
        shutil.copy(video, src)
    good = (src / "test-000000.mp4").read_bytes()
    (src / "a-empty.mp4").write_bytes(b"")
    (src / "test-000000-cut.mp4").write_bytes(good[: len(good) // 2])
    (src / "z-text.mp4").write_text("this is no video\n" * 50)
    return src


def test_bad_files_are_named_and_change_nothing_else(some_bad, tmp_path):
    bad = {"a-empty.mp4", "test-000000-cut.mp4", "z-text.mp4"}
    printed = packed(some_bad, tmp_path / "with", name="toy")
    assert skipped_names(tmp_path / "with") == bad
    assert all(name in printed for name in bad)
    for name in bad:
        (some_bad / name).unlink()
    packed(some_bad, tmp_path / "without", name="toy")
    assert skipped_names(tmp_path / "without") == set()
    differing = {
        name
        for name, data in contents(tmp_path / "with").items()
        if data != contents(tmp_path / "without")[name]
    }
    assert differing == {"skipped.csv"}


def test_too_many_bad_files_stop_the_command(some_bad, tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            r"2 of 7 videos cannot be read so far, expected at most .*--max-bad-fraction 0\.2 .*a-empty\.mp4:"
            r" the file is empty"
        ),
    ):
        packed(some_bad, tmp_path / "out", max_bad_fraction=0.2)
    assert not (tmp_path / "out").exists()


def test_pack_does_not_delete_what_is_not_its_own(synth_videos, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than shards"):
        packed(synth_videos, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.needs_data
def test_real_videos_all_pack(shared_videos, tmp_path):
    packed(shared_videos, tmp_path / "out", short_side=48, workers=2)
    samples = [sample for shard in open_dataset(tmp_path / "out").samples("all") for sample in shard]
    assert {sample.key for sample in samples} == {f"videos/{path.name}" for path in shared_videos.iterdir()}
    assert skipped_names(tmp_path / "out") == set()
    assert {min(sample.width, sample.height) for sample in samples} == {48}
    assert new_reader(tmp_path / "out").clips(range(len(samples))).good.all()


@pytest.mark.needs_data
def test_real_bad_videos_change_only_the_list_of_skips(shared_videos, shared_bad, tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for path in [
        *sorted(shared_videos.iterdir(), key=lambda path: path.stat().st_size)[:4],
        *shared_bad.iterdir(),
    ]:
        shutil.copy(path, src)
    packed(src, tmp_path / "with", max_bad_fraction=0.9)
    skipped = skipped_names(tmp_path / "with")
    assert {
        "moviepy__result.webm",
        "derived__truncated_bug_no_moov.mp4",
        "small__mp4-with-audio.mp4",
        "small__Mpeg4.mp4",
    } <= skipped
    assert not skipped & {path.name for path in shared_videos.iterdir()}
    for name in skipped:
        (src / name).unlink()
    packed(src, tmp_path / "without")
    differing = {
        name
        for name, data in contents(tmp_path / "with").items()
        if data != contents(tmp_path / "without")[name]
    }
    assert differing == {"skipped.csv"}


# --- reader ---


def test_clips_are_a_function_of_their_slots(shards):
    slots = range(35, 47)  # into the second pass
    together = new_reader(shards).clips(slots)
    assert together.good.all()
    assert together.views == (0,) * 5 + (1,) * 7
    assert together.digests == tuple(clip_digest(clip) for clip in together.pixels)
    assert len(set(together.digests)) == 12
    reader = new_reader(shards, frame_cache_bytes=200_000, decode_processes=1)  # room for a few of the videos
    assert reader.clips(slots[::-1]).digests == together.digests[::-1]
    assert tuple(digest for slot in slots for digest in reader.clips([slot]).digests) == together.digests


def test_a_pass_reads_every_video_of_its_split_once(shards):
    keys = new_reader(shards).clips(range(40)).keys
    assert len(set(keys)) == 40
    assert all(key.startswith("toy/train-") for key in keys)


def test_a_corrupted_video_keeps_its_slot(shards, tmp_path):
    data = tmp_path / "toy"
    shutil.copytree(shards, data)
    sample = next(sample for shard in open_dataset(data).samples("train") for sample in shard)
    with (data / sample.tar).open("r+b") as tar:
        tar.seek(sample.offset)
        tar.write(bytes(sample.size))
    reader, clean = new_reader(data), new_reader(shards).clips(range(40))
    batch = reader.clips(range(40))
    assert batch.keys == clean.keys
    row = batch.keys.index(sample.key)
    assert np.flatnonzero(~batch.good).tolist() == [row]
    assert not batch.pixels[row].any()
    assert list(reader.skipped) == [sample.key]
    assert [digest for place, digest in enumerate(batch.digests) if place != row] == [
        digest for place, digest in enumerate(clean.digests) if place != row
    ]


def test_too_many_bad_clips_stop_the_run(shards, tmp_path):
    data = tmp_path / "toy"
    shutil.copytree(shards, data)
    tar = sorted(data.glob("*.tar"))[-1]
    bad = [
        sample for shard in open_dataset(data).samples("train") for sample in shard if sample.tar == tar.name
    ]
    tar.write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=(
            f"got {len(bad)} clips that cannot be decoded among 40, expected at most"
            " loader.max_bad_fraction=0 "
        ),
    ):
        new_reader(data, max_bad_fraction=0).clips(range(40))


def test_an_unknown_split_is_an_error(shards):
    with pytest.raises(ValueError, match="got split 'valid', expected one of test, train, or all"):
        Reader(str(shards), data_seed=0, views="fresh", view=VIEW, split="valid", loader=LoaderConfig())


# --- videos made here ---


def test_motion_label_is_the_measured_motion():
    config = SynthConfig(out="unused")
    right = 0
    for number in range(40):
        frames, _, motion = moving_digit(config, "train", number)
        moving = np.square(np.abs(frames - np.median(frames, 0)).sum(-1))
        quarter = config.num_frames // 4
        (x_early, y_early), (x_late, y_late) = (
            _centroid(part.sum(0)) for part in (moving[:quarter], moving[-quarter:])
        )
        angle = math.atan2(-(y_late - y_early), x_late - x_early)  # y points down
        right += MOTIONS[round(angle / (math.pi / 4)) % len(MOTIONS)] == motion
    assert right >= 36


def _centroid(weight: np.ndarray) -> tuple[float, float]:
    y, x = np.indices(weight.shape)
    return (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()


def test_the_smallest_frame_has_room_for_every_drift():
    config = SynthConfig(out="unused", size=36)
    assert all(
        moving_digit(config, "train", number)[0].shape == (config.num_frames, 36, 36, 3)
        for number in range(200)
    )
    with pytest.raises(pydantic.ValidationError, match="greater than or equal to 36"):
        SynthConfig(out="unused", size=34)


def test_synth_refuses_a_folder_in_use(synth_videos):
    from salt_distill.common.data.making.synth import synthesise

    with pytest.raises(ValueError, match="which is not empty, expected a new folder"):
        synthesise(SynthConfig(out=str(synth_videos)))
