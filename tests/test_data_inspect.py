"""What `salt-data inspect` counts, and that its contact sheet shows the clips and masks of a run."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_tools import VIEW, encoded_image, grey_video, new_reader, packed, samples_of, write
from PIL import Image

from salt_distill.common.config import EncoderConfig, InspectConfig
from salt_distill.common.data.making.inspect import histogram, inspect
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.pictures import strip, tint_masks, token_roles

ENCODER = EncoderConfig(width=24, depth=1, num_heads=2, mlp_width=48, patch_size=8)


def look(data: Path, **config) -> InspectConfig:
    return InspectConfig(data=str(data), encoder=ENCODER, view=VIEW, **config)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Ten videos of 3 to 12 s in two classes, two of them of one content, one image and two bad files."""
    root = tmp_path_factory.mktemp("odd")
    for number in range(10):
        write(
            root / "v" / ("even" if number % 2 == 0 else "odd") / f"{number}.mp4",
            grey_video(*range(100, 103 + number), fps=1),
        )
    write(root / "v" / "even" / "again.mp4", grey_video(*range(100, 105), fps=1))
    write(root / "v" / "odd" / "still.png", encoded_image(np.zeros((24, 40, 3), np.uint8)))
    write(root / "v" / "odd" / "empty.mp4", b"")
    write(root / "v" / "odd" / "text.mp4", b"no video")
    packed(root / "v", root / "out", images="each", label_from_folder="parity", max_shard_bytes=10_240)
    return root / "out"


def test_everything_is_counted(odd, capsys):
    inspect(look(odd, json_=True))
    found = json.loads(capsys.readouterr().out)
    samples = samples_of(odd).values()
    assert (found["name"], found["kind"], found["num_samples"], found["splits"]) == (
        "v",
        "packed",
        12,
        {"train": 12},
    )
    assert found["labels"] == {"parity": {"even": 6, "odd": 6}}
    assert found["codecs"] == {"h264": 11, "png": 1}
    assert found["resolutions"] == {"32x16": 11, "40x24": 1}
    assert found["fps"] == {"1": 12}
    assert found["hours"] == pytest.approx((sum(range(3, 13)) + 5 + 1) / 3600)
    assert (found["duration_s"]["least"], found["duration_s"]["median"], found["duration_s"]["most"]) == (
        1,
        6.5,
        12,
    )
    assert [(bar["from"], bar["to"], bar["count"]) for bar in found["duration_s"]["histogram"]] == [
        (0, 2, 1), (2, 4, 1), (4, 6, 3), (6, 8, 2), (8, 10, 2), (10, 12, 2), (12, 14, 1),
    ]  # fmt: skip
    assert found["frames_of_a_clip"] == 7  # 4 frames, every second
    assert found["num_shorter_than_a_clip"] == sum(sample.num_frames < 7 for sample in samples) == 6
    assert found["num_duplicates"] == 1
    assert found["num_shards"] == len(list(odd.glob("*.tar"))) > 1
    assert found["shard_bytes"] == sum(tar.stat().st_size for tar in odd.glob("*.tar"))
    assert found["video_bytes"] == sum(sample.size for sample in samples)
    assert {Path(row["path"]).name: row["reason"] for row in found["skipped"]} == {
        "empty.mp4": "the file is empty",
        "text.mp4": "it is no video that FFmpeg can open (Invalid data found when processing input)",
    }


@given(st.lists(st.floats(0.01, 5000), min_size=1, max_size=40))
def test_a_histogram_holds_every_duration(seconds):
    bins = histogram(np.array(seconds))
    assert 1 <= len(bins) <= 12
    assert sum(bar["count"] for bar in bins) == len(seconds)
    for bar in bins:
        assert bar["count"] == sum(bar["from"] <= value < bar["to"] for value in seconds) or near_an_edge(
            seconds, bar
        )


def near_an_edge(seconds: list[float], bar: dict[str, float]) -> bool:
    """Edges are rounded to be read."""
    return any(abs(value - bar[edge]) < 1e-5 for value in seconds for edge in ("from", "to"))


def test_people_see_the_same(odd, capsys):
    inspect(look(odd))
    printed = capsys.readouterr().out
    for text in (
        "12 (12 train)",
        "1.00 to 12.00 s, median 6.50 s",
        "h264",
        "32x16",
        "parity",
        "2 files, named in",
        "the file is empty",
        "█",
    ):
        assert text in printed


def test_a_split_alone(shards, capsys):
    inspect(look(shards, json_=True, split="test"))
    found = json.loads(capsys.readouterr().out)
    samples = samples_of(shards, "test").values()
    assert found["splits"] == {"test": 10}
    digits = Counter(sample.labels["digit"] for sample in samples)
    assert found["labels"]["digit"] == {str(digit): digits[digit] for digit in range(10)}
    with pytest.raises(ValueError, match="got split 'valid', expected one of test, train, or all"):
        inspect(look(shards, split="valid"))


def test_a_missing_shard_is_named(odd, tmp_path, capsys):
    shutil.copytree(odd, tmp_path / "out")
    first = sorted((tmp_path / "out").glob("*.tar"))[0]
    first.unlink()
    inspect(look(tmp_path / "out", json_=True))
    assert json.loads(capsys.readouterr().out)["missing_shards"] == [first.name]


def find(picture: np.ndarray, page: np.ndarray) -> bool:
    """Whether a picture stands somewhere on the page, at the left margin."""
    shown = picture[..., :3]
    opaque = picture[..., 3] > 0
    left = 12
    for top in range(page.shape[0] - shown.shape[0] + 1):
        window = page[top : top + shown.shape[0], left : left + shown.shape[1]]
        if np.array_equal(window[0][opaque[0]], shown[0][opaque[0]]) and np.array_equal(
            window[opaque], shown[opaque]
        ):
            return True
    return False


def test_the_sheet_shows_what_the_model_sees(shards, tmp_path, capsys):
    config = look(shards, split="train", sheet=str(tmp_path / "sheet.png"), num_clips=3, data_seed=0, seed=5)
    inspect(config)
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    clips = new_reader(shards).clips(range(4)).pixels
    assert [find(strip(clip, 2), page) for clip in clips] == [True, True, True, False]
    grid = token_grid(VIEW, ENCODER)
    masks = mask_group(config.mask, grid, seed=5, step=1, group=0, batch_size=24).sets
    for mask in masks:
        assert find(strip(tint_masks(clips[0], token_roles(mask, 0, grid.num_tokens), grid), 2), page)
    inspect(config.model_copy(update={"sheet": str(tmp_path / "other.png"), "seed": 6}))
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "sheet.png").read_bytes()


def test_a_clip_that_the_encoder_cannot_cut_is_refused():
    with pytest.raises(
        ValueError, match=r"got a clip of 4 frames of 24 pixels, expected multiples of .*patch_size=16"
    ):
        InspectConfig(data="shards", view=VIEW)
