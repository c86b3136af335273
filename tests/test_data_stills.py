"""Frame folders and images: packed as they are, decoded like videos."""

import json
import os

import numpy as np
import pytest
import webdataset
from pack_tools import encoded_image, grey_video, new_reader, packed, samples_of, skipped, write
from PIL import Image

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import ViewConfig
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.stills import probe_stills, stills_in
from salt_distill.common.data.video import decode, probe


@pytest.fixture(scope="module")
def real_frames(shared_videos) -> np.ndarray:
    return decode((shared_videos / "imageio__realshort.mp4").read_bytes(), range(36))


@pytest.mark.needs_data
def test_a_frame_folder_is_one_video_of_the_original_images(real_frames, tmp_path):
    images = {}
    for number, frame in enumerate(real_frames):
        # Not in the order of their names: 8, 9, 10, ...
        images[number] = encoded_image(frame, "JPEG", quality=90)
        write(tmp_path / "frames" / "run" / "a" / f"frame_{8 + number}.JPG", images[number])
    write(tmp_path / "frames" / "run" / "b" / "1.png", encoded_image(real_frames[0]))
    write(tmp_path / "frames" / "run" / "b" / "2.png", encoded_image(real_frames[1]))
    packed(tmp_path / "frames", tmp_path / "out", images="frames", fps=30, label_from_folder="action")
    samples = samples_of(tmp_path / "out")
    assert set(samples) == {"frames/run/a", "frames/run/b"}
    sample = samples["frames/run/a"]
    assert (sample.num_frames, sample.fps, sample.duration_s, sample.width, sample.height, sample.codec) == (
        36,
        30,
        1.2,
        320,
        240,
        "jpeg",
    )
    assert sample.labels == {"action": 0}

    seen = {}
    for plain in webdataset.WebDataset([str(tmp_path / "out" / "frames-000000.tar")], shardshuffle=False):
        seen[json.loads(plain["json"])["key"]] = plain
    assert len(seen) == 2
    assert [seen["frames/run/a"][f"{number:06d}.jpg"] for number in range(36)] == list(images.values())

    data = open_dataset(tmp_path / "out").read(sample)
    as_pillow = [
        np.asarray(Image.open(tmp_path / "frames" / "run" / "a" / f"frame_{8 + number}.JPG"))
        for number in (3, 0, 35)
    ]
    assert np.array_equal(decode(data, [3, 0, 35]), as_pillow)
    clips = new_reader(tmp_path / "out").clips(range(2))
    assert clips.good.all()
    # The index made anew from the tar finds the same runs of members.
    before = open_dataset(tmp_path / "out").index_hash
    (tmp_path / "out" / "dataset.json").unlink()
    assert open_dataset(tmp_path / "out").index_hash == before


def test_the_content_of_a_frame_folder_is_the_same_wherever_it_stands(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    for folder in ("a", "b"):
        for number in range(3):
            write(tmp_path / "v" / folder / f"{number}.png", encoded_image(pixels + number))
    packed(tmp_path / "v", tmp_path / "out", images="frames", fps=5)
    assert len({sample.sha256 for sample in samples_of(tmp_path / "out").values()}) == 1


def test_a_list_may_name_frame_folders(tmp_path):
    for number in range(3):
        write(tmp_path / "a" / f"{number}.png", encoded_image(np.full((16, 16, 3), number, np.uint8)))
    write(tmp_path / "b.mp4")
    table = write(tmp_path / "train.csv", "a 1\nb.mp4 0\n")
    packed(table, tmp_path / "out", fps=4)
    assert {
        key: (sample.num_frames, sample.duration_s) for key, sample in samples_of(tmp_path / "out").items()
    } == {
        "train/a": (3, 0.75),
        "train/b.mp4": (12, 2.4),
    }
    packed(table, tmp_path / "out")
    assert skipped(tmp_path / "out") == {"a": "it is a folder of images, expected --fps for their rate"}
    with pytest.raises(
        ValueError, match=r"got --images frames with the list .*train\.csv, expected it for a folder or glob"
    ):
        packed(table, tmp_path / "out", images="frames", fps=4)


def test_frame_folders_that_are_none_are_named(tmp_path):
    png, small = encoded_image(np.zeros((16, 16, 3), np.uint8)), encoded_image(np.zeros((8, 8, 3), np.uint8))
    for name in (
        "good/1.png",
        "good/2.png",
        "good/notes.txt",
        "single/1.png",
        "numberless/1.png",
        "numberless/cover.png",
        "twice/x1.png",
    ):
        write(tmp_path / "v" / name, png)
    write(tmp_path / "v" / "twice" / "y1.png", png)
    write(tmp_path / "v" / "sizes" / "1.png", png)
    write(tmp_path / "v" / "sizes" / "2.png", small)
    write(tmp_path / "v" / "torn" / "1.png", png)
    write(tmp_path / "v" / "torn" / "2.png", png[:50])
    (tmp_path / "v" / "pipe").mkdir()
    write(tmp_path / "v" / "pipe" / "1.png", png)
    os.mkfifo(tmp_path / "v" / "pipe" / "2.png")
    packed(tmp_path / "v", tmp_path / "out", images="frames", fps=5, max_bad_fraction=0.9)
    assert set(samples_of(tmp_path / "out")) == {"v/good"}
    reasons = skipped(tmp_path / "out")
    assert reasons.pop("torn").startswith("frame 1 cannot be decoded")
    assert reasons == {
        "single": "it has 1 frame, expected at least 2",
        "numberless": "its image cover.png has no number, expected all of them to be numbered frames",
        "twice": "its images x1.png and y1.png have the same number",
        "sizes": "frame 1 has another size than the frames before it",
        "pipe": "it is a named pipe, expected a regular file",
    }


@pytest.mark.needs_data
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
def test_an_image_is_a_clip_that_stands_still(real_frames, tmp_path, suffix):
    image = encoded_image(real_frames[5], {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    write(tmp_path / "v" / "n01440764" / f"n01440764_10026.{suffix}", image)
    packed(tmp_path / "v", tmp_path / "out", images="each", label_from_folder="synset")
    (sample,) = samples_of(tmp_path / "out").values()
    assert (sample.num_frames, sample.labels) == (1, {"synset": 0})
    assert open_dataset(tmp_path / "out").read(sample) == image
    view = ViewConfig(num_frames=4, crop_size=240, scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip=False)
    (clip,) = new_reader(tmp_path / "out", view=view).clips([0]).pixels
    assert all(np.array_equal(frame, clip[0]) for frame in clip)
    (plain,) = webdataset.WebDataset([str(tmp_path / "out" / "v-000000.tar")], shardshuffle=False).decode(
        "rgb8"
    )
    decoded = (
        plain[suffix] if suffix not in ("bmp", "tiff") else real_frames[5]
    )  # webdataset leaves these two as bytes
    assert np.array_equal(decode(image, [0])[0], decoded)


def test_images_come_upright_and_whole():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:5] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the right side of what is shown is the top of what is stored
    upright = decode(encoded_image(pixels, "PNG", exif=exif), [0])[0]
    assert np.array_equal(upright, np.rot90(pixels, -1))
    assert decode(encoded_image(pixels[..., 0]), [0, 0]).shape == (2, 20, 30, 3)  # grey
    for bad, reason in (
        (encoded_image(pixels, "JPEG")[:-30], "frame 0 cannot be decoded"),
        (
            encoded_image(np.zeros((20, 30), np.uint16)),
            "frame 0 has pixels of mode I;16, expected at most 8 bits a channel",
        ),
        (
            encoded_image(pixels, "WEBP", save_all=True, append_images=[Image.fromarray(pixels + 9)]),
            "frame 0 is an animation",
        ),
    ):
        with pytest.raises(BadVideoError, match=reason):
            probe(bad)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_damaged_image_is_bad_and_nothing_else(format):
    rng = np.random.default_rng(0)
    image = encoded_image(rng.integers(0, 256, (24, 32, 3), np.uint8), format)
    num_bad = 0
    for _ in range(300):
        damaged = np.frombuffer(image, np.uint8).copy()
        damaged[rng.integers(4, 120, 3)] = rng.choice([0, 255, 128], 3)
        try:
            probe(damaged.tobytes())
        except BadVideoError:
            num_bad += 1
    assert num_bad > 20


def test_a_run_of_frames_that_was_damaged_is_bad(tmp_path):
    for number in range(3):
        write(tmp_path / "v" / "a" / f"{number}.png", encoded_image(np.full((16, 16, 3), number, np.uint8)))
    packed(tmp_path / "v", tmp_path / "out", images="frames", fps=5)
    data = open_dataset(tmp_path / "out").read(samples_of(tmp_path / "out")["v/a"])
    images = stills_in(data)
    assert images is not None
    assert probe_stills(images).num_frames == 3
    with pytest.raises(BadVideoError, match="its frame 1 is no member of a tar"):
        probe(data[:1024] + bytes(1024) + data[2048:])
    with pytest.raises(BadVideoError, match="frame 2 is cut off"):
        probe(data[:-100])


def test_a_smaller_copy_only_of_what_is_larger(tmp_path):
    write(tmp_path / "v" / "small.mp4", grey_video(10, 20, 30, size=(32, 48)))
    write(tmp_path / "v" / "large.mp4", grey_video(10, 20, 30, size=(64, 96)))
    write(tmp_path / "v" / "large.png", encoded_image(np.full((64, 96, 3), 77, np.uint8)))
    packed(tmp_path / "v", tmp_path / "out", images="each", short_side=32)
    samples, dataset = samples_of(tmp_path / "out"), open_dataset(tmp_path / "out")
    assert dataset.read(samples["v/small.mp4"]) == (tmp_path / "v" / "small.mp4").read_bytes()
    for name, levels in (("large.mp4", [10, 20, 30]), ("large.png", [77])):
        sample = samples[f"v/{name}"]
        assert (sample.height, sample.width, sample.num_frames) == (32, 48, len(levels))
        assert np.abs(decode(dataset.read(sample), range(len(levels))).mean((1, 2, 3)) - levels).max() < 4
