"""Labelled videos made here: a handwritten digit drifts over a coloured ground, among textured patches that
stay where they are."""

import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, UInt8
from rich.progress import track

from salt_distill.common.config import SynthConfig
from salt_distill.common.csv_text import csv_text
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.draws import uniforms
from salt_distill.common.whole import write_whole

MOTIONS = ("east", "northeast", "north", "northwest", "west", "southwest", "south", "southeast")
"""Directions of the drift, counter-clockwise from the right."""
DIGIT_SIDE = 16
"""Pixels of the digit's square."""
DIGIT_LEVELS = (0.75, 1.0)
"""Range of the digit's red, green and blue: it is always brighter than what is around it, so that one
direction of contrast has to be learned."""
GROUND_LEVELS = (0.0, 0.5)
"""Range of the ground's and the patches' red, green and blue."""
PATCH_SIDE = 12
"""Pixels of a distractor's square."""
STRIPE_PERIOD = 6.0
"""Pixels from stripe to stripe of a distractor."""
DRIFT = (12.0, 20.0)
"""Range of the drift over the whole video, in pixels."""
HOLD_FRAMES = 4
"""Frames that the digit rests before it moves on. Within a tubelet of the nano preset nothing moves, so no
token shows the direction: it can only be told from where the digit was at different times."""
CRF, PIX_FMT = 0, "yuv444p"
"""Quality of the encoding: the same picture, colours rounded. A plain patch has to stay plain: whatever noise
it had, or colour that runs over from its neighbour, would be magnified by the normalisation of its pixels,
and be what a teacher has to predict."""


def synthesise(config: SynthConfig) -> None:
    """Writes ``train-*.mp4``, ``test-*.mp4`` and ``labels.csv`` (path, split, digit, motion). Raises
    ValueError for a folder in use."""
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"got OUT {out}, which is not empty, expected a new folder")
    out.mkdir(parents=True, exist_ok=True)
    jobs = [
        (split, number)
        for split, count in (("train", config.num_train), ("test", config.num_test))
        for number in range(count)
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(_write_video, [config] * len(jobs), jobs, chunksize=25)
        rows = list(track(made, total=len(jobs), description="synth"))
    (out / "labels.csv").write_text(csv_text([("path", "split", "digit", "motion"), *rows]))


def _write_video(config: SynthConfig, job: tuple[str, int]) -> tuple[str, str, str, str]:
    split, number = job
    frames, digit, motion = moving_digit(config, split, number)
    path = f"{split}-{number:06d}.mp4"
    images = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
    video = encode_mp4(
        images, width=config.size, height=config.size, fps=config.fps, crf=CRF, pix_fmt=PIX_FMT
    )
    write_whole(Path(config.out) / path, video)
    return path, split, str(digit), motion


def moving_digit(
    config: SynthConfig, split: str, number: int
) -> tuple[UInt8[np.ndarray, "t h w 3"], int, str]:
    """One video with its digit and its motion; a function of (seed, split, number)."""
    images, digits = _digits(split)
    draw = iter(uniforms(config.seed, f"synth {split}", number, 64))
    digit_idx = int(next(draw) * len(images))
    motion = int(next(draw) * len(MOTIONS))
    drift = _drift(config, motion, next(draw))
    room = config.size - DIGIT_SIDE - 1
    # The middle of the path is uniform over what keeps both ends in the frame: nothing ever leaves it or
    # bounces.
    middle = [abs(d) / 2 + next(draw) * (room - abs(d)) for d in drift]
    image = _enlarge(images[digit_idx])
    colour = _colour(DIGIT_LEVELS, draw)
    background = _background(config.size, draw)
    frames = np.empty((config.num_frames, config.size, config.size, 3), np.uint8)
    for t in range(config.num_frames):
        progress = t // HOLD_FRAMES / (math.ceil(config.num_frames / HOLD_FRAMES) - 1) - 0.5
        left, top = (m + d * progress for m, d in zip(middle, drift, strict=True))
        frames[t] = np.rint(255 * _draw(background, image, colour, left, top)).astype(np.uint8)
    return frames, int(digits[digit_idx]), MOTIONS[motion]


def _drift(config: SynthConfig, motion: int, share: float) -> tuple[float, float]:
    """(x, y) of the whole path; y points down."""
    length = DRIFT[0] + share * (DRIFT[1] - DRIFT[0])
    angle = 2 * math.pi * motion / len(MOTIONS)
    return length * math.cos(angle), -length * math.sin(angle)


@functools.cache
def _digits(split: str) -> tuple[Float[np.ndarray, "m 8 8"], np.ndarray]:
    """scikit-learn's handwritten digits; the last quarter, other writers' hands, is for the test split."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    held_out = 3 * len(images) // 4
    rows = slice(held_out, None) if split == "test" else slice(None, held_out)
    return np.asarray(images)[rows].reshape(-1, 8, 8) / 16.0, np.asarray(digits)[rows]


def _enlarge(image: Float[np.ndarray, "8 8"]) -> Float[np.ndarray, "s s"]:
    return np.clip(_bilinear(image, DIGIT_SIDE), 0, 1)


def _bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Corners of the image on the corners of the result."""
    at = np.linspace(0, len(image) - 1, size)
    low = np.minimum(at.astype(int), len(image) - 2)
    share = (at - low).reshape(-1, *[1] * (image.ndim - 1))
    rows = image[low] * (1 - share) + image[low + 1] * share
    columns = np.moveaxis(rows, 1, 0)
    return np.moveaxis(columns[low] * (1 - share) + columns[low + 1] * share, 0, 1)


def _background(size: int, draw: Iterator[float]) -> Float[np.ndarray, "h w 3"]:
    """A plain ground and two striped patches as distractors. A ground with a gradient would be most of what
    masked pixels have to be predicted from, and a small teacher would be busy with it for longer than a demo
    lasts."""
    texture = np.empty((size, size, 3))
    texture[:] = _colour(GROUND_LEVELS, draw)
    y, x = np.mgrid[0:size, 0:size]
    for _ in range(2):
        left, top = (int(next(draw) * size) - PATCH_SIDE // 2 for _ in range(2))  # may lie partly outside
        angle, phase = math.pi / 4 * int(next(draw) * 4), 2 * math.pi * next(draw)
        wave = np.sin(2 * math.pi / STRIPE_PERIOD * (x * math.cos(angle) + y * math.sin(angle)) + phase)
        dark, light = _colour(GROUND_LEVELS, draw), _colour(GROUND_LEVELS, draw)
        window = np.s_[max(top, 0) : top + PATCH_SIDE, max(left, 0) : left + PATCH_SIDE]
        texture[window] = (dark + (light - dark) * (0.5 + 0.5 * wave[..., None]))[window]
    return texture


def _colour(levels: tuple[float, float], draw: Iterator[float]) -> Float[np.ndarray, " 3"]:
    low, high = levels
    return np.array([low + (high - low) * next(draw) for _ in range(3)])


def _draw(
    background: Float[np.ndarray, "h w 3"],
    image: Float[np.ndarray, "s s"],
    colour: Float[np.ndarray, " 3"],
    left: float,
    top: float,
) -> Float[np.ndarray, "h w 3"]:
    """The digit over the background, placed to a fraction of a pixel."""
    column, row = int(left), int(top)
    x, y = left - column, top - row
    alpha = np.zeros((DIGIT_SIDE + 1, DIGIT_SIDE + 1))
    for shift_y, share_y in ((0, 1 - y), (1, y)):
        for shift_x, share_x in ((0, 1 - x), (1, x)):
            alpha[shift_y : shift_y + DIGIT_SIDE, shift_x : shift_x + DIGIT_SIDE] += share_y * share_x * image
    frame = background.copy()
    window = frame[row : row + DIGIT_SIDE + 1, column : column + DIGIT_SIDE + 1]
    window[...] = window * (1 - alpha[..., None]) + alpha[..., None] * colour
    return frame
