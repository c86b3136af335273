"""Timed pen drawings as labelled videos: `python -m benchmarks.study.strokes LABELLED VIDEOS`. The pen writes
a character of one of five alphabets."""

import argparse
import csv
import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from rich.progress import track

from salt_distill.common.data.encode import encode_mp4

ARCHIVE = "omniglot_strokes_background_small1.zip"
_NAME = re.compile(r"[^/]+/(?P<alphabet>[^/]+)/(?P<character>character\d+)/\d+_(?P<drawer>\d+)\.txt")
TEST_DRAWERS = range(15, 21)
"""The last six of twenty people are the test split's."""
SIZE, NUM_FRAMES, FPS = 40, 16, 12.0
CANVAS = 105
"""Pixels of the drawings' square; y runs from 0 down to -105."""
LONGEST_LIFT_MS = 150.0
"""A pen that is lifted for longer is taken to think, not to draw."""
FINER = 4
"""The pen is drawn so many times larger, and averaged."""
PEN = 2.0
"""Width of the line, in pixels."""
INK, GROUND = 230, 30

Stroke = Float[np.ndarray, "p 3"]
"""x, y (down) in pixels of the canvas, time in ms."""


def read_strokes(text: str) -> list[Stroke]:
    """The strokes of a drawing: lines of x,y,t between START and BREAK. Long lifts are cut short."""
    strokes, points, cut, last = [], [], 0.0, None
    for line in text.split():
        if line == "START":
            continue
        if line == "BREAK":
            if points:
                strokes.append(np.array(points))
            points = []
            continue
        x, y, t = (float(value) for value in line.split(","))
        if last is not None and not points:
            cut += max(0.0, t - last - LONGEST_LIFT_MS)
        last = t
        points.append((x, -y, t - cut))
    if not strokes or points:
        raise ValueError(
            f"got a drawing of {len(strokes)} whole strokes, expected one or more, each ended by BREAK"
        )
    return strokes


def draw(strokes: list[Stroke]) -> UInt8[np.ndarray, "t h w 3"]:
    """The pen at work: each frame holds what is written up to its time, the last one all."""
    first, last = strokes[0][0, 2], strokes[-1][-1, 2]
    scale, half = SIZE * FINER / CANVAS, PEN * FINER / 2
    frames = np.empty((NUM_FRAMES, SIZE, SIZE, 3), np.uint8)
    for number in range(NUM_FRAMES):
        until = first + (last - first) * (number + 1) / NUM_FRAMES
        image = Image.new("L", (SIZE * FINER, SIZE * FINER), GROUND)
        pen = ImageDraw.Draw(image)
        for stroke in strokes:
            written = stroke[stroke[:, 2] <= until, :2] * scale
            pen.line([tuple(point) for point in written], fill=INK, width=round(PEN * FINER))
            for x, y in written:
                pen.ellipse((x - half, y - half, x + half, y + half), fill=INK)
        frames[number] = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))[..., None]
    return frames


def drawings(archive: Path) -> Iterator[tuple[str, str, str, int, str]]:
    """Of each drawing: name, alphabet, character, drawer, and its text."""
    with zipfile.ZipFile(archive) as files:
        for name in sorted(files.namelist()):
            if found := _NAME.fullmatch(name):
                alphabet, character = found["alphabet"], f"{found['alphabet']}/{found['character']}"
                yield (
                    f"{alphabet}-{found['character']}-{found['drawer']}",
                    alphabet,
                    character,
                    int(found["drawer"]),
                    files.read(name).decode(),
                )


def _write(out: Path, name: str, text: str) -> None:
    images = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in draw(read_strokes(text))]
    (out / f"{name}.mp4").write_bytes(
        encode_mp4(images, width=SIZE, height=SIZE, fps=FPS, crf=0, pix_fmt="yuv444p")
    )


def main() -> None:
    """Writes a video of each drawing, and labels.csv (path, split, alphabet, character)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labelled", type=Path, help=f"folder with {ARCHIVE}")
    parser.add_argument("videos", type=Path, help="folder to write; it must not exist")
    arguments = parser.parse_args()
    arguments.videos.mkdir(parents=True)
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        made = []
        for name, alphabet, character, drawer, text in drawings(arguments.labelled / ARCHIVE):
            made.append(pool.submit(_write, arguments.videos, name, text))
            rows.append((f"{name}.mp4", "test" if drawer in TEST_DRAWERS else "train", alphabet, character))
        for one in track(made, description="strokes"):
            one.result()
    with (arguments.videos / "labels.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "split", "alphabet", "character"), *rows])


if __name__ == "__main__":
    main()
