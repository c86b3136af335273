"""The clips that an evaluation takes of a video: their frames and their places, by hand."""

import numpy as np
import pytest

from salt_distill.common.config import PROTOCOLS, ProbeConfig, ViewConfig, preset_layer
from salt_distill.common.data import views
from salt_distill.common.data.segments import SegmentCut, centred_box, segment_start

VIEW = ViewConfig(num_frames=4, frame_step=2, crop_size=16)  # a clip spans 7 frames


def numbered(num_frames: int, height: int, width: int) -> list[np.ndarray]:
    """Frames whose first channel is their number, the others the row and the column."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return [
        np.stack([np.full_like(rows, number), rows, columns], axis=2).astype(np.uint8)
        for number in range(num_frames)
    ]


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(16, 16, (0, 0, 16, 16)), (40, 24, (8, 0, 24, 24)), (25, 46, (0, 11, 25, 25))],
)
def test_one_whole_square_is_the_largest_centred_one(height, width, box):
    assert centred_box(VIEW, height, width, 0.5, 1.0) == box


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(16, 24, (0, 0, 16, 24)), (40, 24, (12, 0, 16, 24)), (25, 46, (0, 4, 25, 38)), (30, 46, (0, 1, 30, 45))],
)
def test_a_crop_of_a_wide_clip_is_the_largest_of_its_shape(height, width, box):
    wide = VIEW.model_copy(update={"crop_size": (16, 24)})
    assert centred_box(wide, height, width, 0.5, 1.0) == box
    pixels, _ = SegmentCut(wide, 1, 1, 1.0).clip(numbered(4, height, width))
    assert pixels.shape == (4, 16, 24, 3)


@pytest.mark.parametrize(("num_frames", "idx"), [(1, [0] * 4), (5, [0, 2, 4, 4]), (30, [12, 14, 16, 18])])
def test_one_segment_takes_the_middle_frames(num_frames, idx):
    assert SegmentCut(VIEW, 1, 1, 1.0).frame_idx(num_frames, None) == idx


@pytest.mark.parametrize(
    ("num_frames", "num_segments", "firsts"),
    [
        (
            40,
            4,
            [2, 12, 22, 32],
        ),  # segments of 10 frames: 4 possible starts each, the clip begins at the third of them
        (28, 4, [0, 7, 14, 21]),  # exactly a clip each
        (13, 4, [0, 2, 4, 6]),  # too short for a clip: spread from the first possible start to the last
        (7, 3, [0, 0, 0]),
        (3, 2, [0, 0]),
    ],
)
def test_segments_start_where_they_should(num_frames, num_segments, firsts):
    idx = np.array(SegmentCut(VIEW, num_segments, 1, 1.0).frame_idx(num_frames, None)).reshape(
        num_segments, 4
    )
    assert idx[:, 0].tolist() == firsts
    assert (idx == np.minimum(idx[:, :1] + np.arange(0, 8, 2), num_frames - 1)).all()


def test_drawn_starts_cover_a_segment_and_nothing_else():
    starts = {
        int(segment_start(VIEW, 40, 1, 4, u) * 34) for u in np.linspace(0, 0.999, 200)
    }  # 34 possible starts of 40 frames
    assert starts == {10, 11, 12, 13}


def test_times_decide_where_the_rate_varies():
    """The second half of the video is shown at half the rate: a clip of a late segment takes every frame
    there, as the pace demands."""
    times = np.concatenate([np.arange(20) * 10, 200 + np.arange(10) * 20])
    idx = np.array(SegmentCut(VIEW, 2, 1, 1.0).frame_idx(30, times)).reshape(2, 4)
    tick = (times[-1] - times[0]) / 29
    for clip in idx:
        assert np.abs(np.diff(times[clip]) - 2 * tick).max() <= 20


def test_squares_stand_at_both_ends_and_in_the_middle():
    boxes = [centred_box(VIEW, 10, 31, position, 1.0) for position in (0, 0.5, 1)]
    assert boxes == [(0, 0, 10, 10), (0, 11, 10, 10), (0, 21, 10, 10)]
    assert [centred_box(VIEW, 31, 10, position, 1.0) for position in (0, 0.5, 1)] == [
        (left, top, h, w) for top, left, h, w in boxes
    ]
    assert centred_box(VIEW, 256, 340, 0.5, 0.875) == (16, 58, 224, 224)  # V-JEPA's single view: 224 of 256


def test_views_come_one_after_the_other_with_all_their_segments():
    cut = SegmentCut(VIEW, 2, 3, 1.0)
    frames = numbered(40, 16, 60)
    pixels, _ = cut.clip([frames[i] for i in cut.frame_idx(40, None)])
    assert pixels.shape == cut.clip_shape == (24, 16, 16, 3)
    by_view = pixels.reshape(3, 2, 4, 16, 16, 3)
    assert by_view[:, :, 0, 0, 0, 0].tolist() == [[7, 27]] * 3
    assert by_view[:, 0, 0, 0, 0, 2].tolist() == [0, 22, 44]


def test_an_image_is_repeated():
    pixels, _ = SegmentCut(VIEW, 1, 1, 1.0).clip([numbered(1, 16, 16)[0]] * 4)
    assert (pixels == pixels[:1]).all()
    assert SegmentCut(VIEW, 1, 1, 1.0).frame_idx(1, None) == [0] * 4


def test_drawn_crops_are_of_each_segment():
    draws = tuple(views.draw(0, f"{number}", 0) for number in range(2))
    cut = SegmentCut(VIEW.model_copy(update={"scale": (0.08, 0.5)}), 2, 1, 1.0, draws)
    frames = numbered(40, 50, 60)
    pixels, _ = cut.clip([frames[i] for i in cut.frame_idx(40, None)])
    first, second = pixels[:4, ..., 1:], pixels[4:, ..., 1:]
    assert (first == first[:1]).all()  # one crop for all frames of a clip
    assert (second == second[:1]).all()
    assert (first[0] != second[0]).any()


@pytest.mark.parametrize(
    ("name", "settings", "clips", "step", "batch_size"),
    [
        ("k400", 20, (16, 8, 3), 4, 256), ("ssv2", 20, (16, 2, 3), 4, 256), ("coin", 1, (16, 8, 3), 4, 256),
        ("jester", 1, (16, 4, 3), 2, 128),
        ("diving48", 1, (16, 4, 3), 2, 128), ("in1k", 1, (16, 1, 1), None, 1024), ("k400-fast", 1, (16, 1,
        1), 4, 256),
        ("ssv2-fast", 1, (16, 1, 1), 4, 256),
    ],
)  # fmt: skip
def test_protocols_are_the_papers(name, settings, clips, step, batch_size):
    """Tables 6 to 8."""
    values = {"ckpt": ("a",), "data": "b", "out": "c"} | preset_layer(ProbeConfig, name, PROTOCOLS)
    config = ProbeConfig.model_validate(values)
    assert len(config.lr) * len(config.weight_decay) == settings
    assert (config.num_frames, config.segments, config.views) == clips
    assert (config.frame_step, config.batch_size, config.epochs, config.crop_size) == (
        step,
        batch_size,
        20,
        224,
    )
    assert config.depth == (1 if name.endswith("fast") else 4)
    if settings == 1:
        assert (config.lr, config.weight_decay) == ((1e-3,), (0.01,))
