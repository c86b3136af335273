"""`salt-eval similar`: the clips nearest to one of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from rich.markup import escape
from rich.table import Table

from salt_distill.common.config import SimilarConfig, ViewConfig
from salt_distill.common.config.embed import VideosConfig
from salt_distill.common.console import new_results
from salt_distill.common.csv_text import csv_text
from salt_distill.common.pictures import png_bytes
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.embed.files import matrix, read_features
from salt_distill.student_trainer.evaluation.embed.windows import Window, WindowsCut
from salt_distill.student_trainer.evaluation.videos import open_videos

TILE, COLUMNS = 192, 4
"""Side of a picture on the sheet, in pixels, and pictures in a row."""


@dataclass(frozen=True)
class EmbeddedClip:
    """A row of the features."""

    path: str
    start_s: float
    end_s: float


def run(config: SimilarConfig) -> None:
    """Prints the nearest clips, and writes them."""
    if (config.sheet is None) != (config.videos is None):
        raise ValueError("got one of --sheet and --videos, expected both or none: pictures are of the videos")
    about, table = read_features(Path(config.features))
    if about.tokens != "clip":
        raise ValueError(
            f"got features of --tokens {about.tokens}, expected one vector a clip: `salt-eval embed --tokens"
            " clip`"
        )
    columns = (table[name].to_pylist() for name in ("path", "start_s", "end_s"))
    clips = [EmbeddedClip(*row) for row in zip(*columns, strict=True)]
    query = _query(clips, config.query)
    rows, cosines = nearest(matrix(table, about.shape), query, config.num)
    neighbours = [(clips[row], float(cosine)) for row, cosine in zip(rows, cosines, strict=True)]
    write_whole(Path(config.out), _csv(neighbours))
    result = Table(title=f"Nearest to {escape(clips[query].path)} at {clips[query].start_s:.1f} s")
    for name in ("video", "from", "to", "cosine"):
        result.add_column(name, justify="left" if name == "video" else "right")
    for clip, cosine in neighbours:
        result.add_row(escape(clip.path), f"{clip.start_s:.1f} s", f"{clip.end_s:.1f} s", f"{cosine:.3f}")
    new_results().print(result)
    if config.sheet is not None and config.videos is not None:
        sheet = _sheet([(clips[query], 1.0), *neighbours], config.videos)
        write_whole(Path(config.sheet), png_bytes(sheet))


def nearest(
    features: Float[np.ndarray, "rows e"], query: int, num: int
) -> tuple[list[int], Float[np.ndarray, " k"]]:
    """The rows nearest to a row by cosine, without itself, and their cosines."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    cosines = unit @ unit[query]
    order = [int(row) for row in np.argsort(-cosines, kind="stable") if row != query][:num]
    return order, cosines[order]


def _query(clips: list[EmbeddedClip], text: str) -> int:
    """The row that is meant: the first of a video, or the one at PATH@SECONDS."""
    typed, separator, seconds = text.rpartition("@")
    path = _name_of(clips, typed)
    if path is None:
        path, separator, seconds = _name_of(clips, text), "", ""
    rows = [row for row, clip in enumerate(clips) if clip.path == path]
    if not rows:
        raise ValueError(
            f"got --query {text}, expected a video of the file, such as"
            f" {clips[0].path if clips else '(it is empty)'}"
        )
    if not separator:
        return rows[0]
    try:
        at_s = float(seconds)
    except ValueError:
        raise ValueError(f"got --query {text}, expected PATH@SECONDS, such as {path}@12.5") from None
    inside = [row for row in rows if clips[row].start_s <= at_s < clips[row].end_s]
    if not inside:
        raise ValueError(
            f"got --query {text}, expected a time inside a clip, from {clips[rows[0]].start_s:.1f} to"
            f" {clips[rows[-1]].end_s:.1f} s"
        )
    return inside[0]


def _name_of(clips: list[EmbeddedClip], typed: str) -> str | None:
    """The video that a path names: as the file has it, or with the folder that was embedded before it."""
    names = {clip.path for clip in clips if typed == clip.path or typed.endswith(f"/{clip.path}")}
    return max(names, key=len, default=None)


def _csv(neighbours: list[tuple[EmbeddedClip, float]]) -> str:
    rows = [("path", "start_s", "end_s", "cosine")]
    for clip, cosine in neighbours:
        rows.append((clip.path, f"{clip.start_s:.3f}", f"{clip.end_s:.3f}", f"{cosine:.6f}"))
    return csv_text(rows)


def _sheet(neighbours: list[tuple[EmbeddedClip, float]], source: str) -> UInt8[np.ndarray, "h w 3"]:
    """The middle frame of each clip, the one that was asked for first, with its cosine."""
    height = TILE + 32
    rows = -(-len(neighbours) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * TILE, rows * height), "white")
    draw = ImageDraw.Draw(page)
    view = ViewConfig(num_frames=1, crop_size=TILE)
    with open_videos(source, VideosConfig(decode_processes=0)) as videos:
        numbers = {name: number for number, name in enumerate(videos.names)}
        for position, (clip, cosine) in enumerate(neighbours):
            if clip.path not in numbers:
                raise ValueError(
                    f"got --videos {source} without {clip.path}, expected the videos that were embedded"
                )
            video = videos.find(numbers[clip.path])
            cut = WindowsCut(view, (Window(clip.start_s, clip.end_s),), video.num_frames / video.fps)
            frames, _ = videos.decode(video, cut).result()
            left, top = position % COLUMNS * TILE, position // COLUMNS * height
            page.paste(Image.fromarray(frames[0]), (left, top))
            name = clip.path if len(clip.path) <= 30 else f"...{clip.path[-27:]}"
            draw.text(
                (left + 4, top + TILE + 2), f"{name}\n{clip.start_s:.1f} s, cosine {cosine:.3f}", fill="black"
            )
    return np.asarray(page)
