"""`salt-eval pictures`: what encoders make of clips, as a picture and a short video for each clip."""

import textwrap
from collections.abc import Iterator, Sequence
from operator import add
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from salt_distill.common.config import FrozenConfig, PicturesConfig
from salt_distill.common.console import console
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.model.checkpoint import open_encoder, read_config
from salt_distill.common.pictures import GAP, png_bytes, strip
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.panels import Panel, components, masks, paintings, predictions
from salt_distill.student_trainer.evaluation.probe.features import first_clips
from salt_distill.student_trainer.evaluation.reconstruction import masks_of

LINE_HEIGHT, CHARACTER_WIDTH = 16, 7
"""Of a title, in pixels."""
PANELS_PER_ROW = 4
VIDEO_FPS = 8.0
VIDEO_HEIGHT = 224
"""Least height of a panel in a video, in pixels."""


def run(config: PicturesConfig) -> None:
    """Writes ``clip-NNN.png`` and ``clip-NNN.mp4`` into ``config.out``."""
    torch.set_num_threads(config.num_threads)
    encoders = [
        open_encoder(FrozenConfig(ckpt=path, num_frames=config.num_frames, crop_size=config.crop_size))
        for path in config.ckpt
    ]
    keys, clips = first_clips(config.data, config.split, encoders[0].view, config.loader, config.num_clips)
    for encoder in encoders:
        if encoder.view.clip_shape != encoders[0].view.clip_shape:
            raise ValueError(
                f"got {encoder.name} for clips {encoder.view.clip_shape} and {encoders[0].name} for"
                f" {encoders[0].view.clip_shape}, expected one shape: set --num-frames and --crop-size, or"
                " give them to two commands"
            )
    panels = [[Panel(title="clip", frames=clip, tubelet_size=1)] for clip in clips]
    sources = [([panel] for panel in components(encoder, clips)) for encoder in encoders]
    sources += [
        _own(Path(path), encoder.name, clips, config)
        for path, encoder in zip(config.ckpt, encoders, strict=True)
    ]
    for source in track(
        sources, description="pictures", console=console, transient=True, disable=not console.is_terminal
    ):
        for of_clip, more in zip(panels, source, strict=True):
            of_clip += more
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for number, (key, of_clip) in enumerate(zip(keys, panels, strict=True)):
        write_whole(out / f"clip-{number:03d}.png", png_bytes(sheet(of_clip)))
        write_whole(out / f"clip-{number:03d}.mp4", video(of_clip))
        console.print(
            f"{out}/clip-{number:03d}.png and .mp4: {key}, {len(of_clip)} panels",
            highlight=False,
            soft_wrap=True,
        )


def sheet(panels: Sequence[Panel]) -> UInt8[np.ndarray, "rows columns 3"]:
    """Every panel as a strip with a frame of each tubelet, one below the other, under its title."""
    tubelet = max(panel.tubelet_size for panel in panels)
    rows = [_on_white(strip(panel.frames, tubelet)) for panel in panels]
    return np.concatenate(
        [
            part
            for panel, row in zip(panels, rows, strict=True)
            for part in (_title(panel.title, row.shape[1]), row)
        ]
    )


def video(panels: Sequence[Panel]) -> bytes:
    """The panels side by side, as an mp4 that plays them together."""
    frames = [_grid(panels, time) for time in range(len(panels[0].frames))]
    height, width = frames[0].shape[:2]
    made = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
    return encode_mp4(made, width=width, height=height, fps=VIDEO_FPS, crf=18)


def _own(
    path: Path, name: str, clips: UInt8[np.ndarray, "b t h w 3"], config: PicturesConfig
) -> Iterator[list[Panel]]:
    """For each clip what only a run of ours can show: its masks, and what it predicts under them."""
    if not (path / "config.yaml").is_file():
        return ([] for _ in clips)
    about = read_config(path)
    if about.view.clip_shape != clips.shape[1:]:
        raise ValueError(
            f"{path}: got clips {clips.shape[1:]}, expected those that it was trained on,"
            f" {about.view.clip_shape}"
        )
    group = masks_of(about, seed=config.seed, step=1, batch_size=len(clips))
    hidden = masks(name, about, group, clips)
    if about.objective == "vpixel":
        return map(add, hidden, paintings(path, name, group, clips))
    if about.objective == "salt" and config.teacher is not None:
        return map(add, hidden, predictions(path, name, group, clips, teacher=config.teacher))
    if about.objective == "salt":
        console.print(f"{name}: no picture of its predictions without --teacher", highlight=False)
    return hidden


def _title(text: str, width: int, num_lines: int = 1) -> UInt8[np.ndarray, "rows columns 3"]:
    """Text on white, in as many lines as it takes, at least ``num_lines``."""
    lines = _lines(text, width)
    image = Image.new("RGB", (width, 8 + LINE_HEIGHT * max(len(lines), num_lines)), "white")
    ImageDraw.Draw(image).multiline_text(
        (4, 4), "\n".join(lines), fill="black", font=ImageFont.load_default(13)
    )
    return np.asarray(image)


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(8, width // CHARACTER_WIDTH))


def _on_white(image: UInt8[np.ndarray, "rows columns 4"]) -> UInt8[np.ndarray, "rows columns 3"]:
    return np.where(image[..., 3:] > 0, image[..., :3], np.uint8(255))


def _grid(panels: Sequence[Panel], time: int) -> UInt8[np.ndarray, "rows columns 3"]:
    """One frame of the video: even sides, as the codec wants them."""
    factor = max(1, -(-VIDEO_HEIGHT // panels[0].frames.shape[1]))
    num_lines = max(len(_lines(panel.title, factor * panel.frames.shape[2])) for panel in panels)
    tiles = []
    for panel in panels:
        frame = panel.frames[time].repeat(factor, axis=0).repeat(factor, axis=1)
        tile = np.concatenate((_title(panel.title, frame.shape[1], num_lines), frame))
        height, width = (GAP + side + side % 2 for side in tile.shape[:2])
        padded = np.full((height, width, 3), 255, dtype=np.uint8)
        padded[: tile.shape[0], : tile.shape[1]] = tile
        tiles.append(padded)
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % PANELS_PER_ROW)
    return rearrange(
        np.stack(tiles), "(rows columns) h w c -> (rows h) (columns w) c", columns=PANELS_PER_ROW
    )
