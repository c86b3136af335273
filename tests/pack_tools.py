"""Small videos, images and tars: what the tests of salt-data share."""

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import rich.console
from PIL import Image

from salt_distill.common.config import LoaderConfig, PackConfig, ViewConfig
from salt_distill.common.data.encode import encode_mp4
from salt_distill.common.data.making.pack import pack
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.skipped import read_skipped

VIEW = ViewConfig(num_frames=4, frame_step=2, crop_size=24)


def packed(src: object, out: Path, **config) -> str:
    """Packs, and gives back what was printed."""
    printed = io.StringIO()
    pack(
        PackConfig(src=str(src), out=str(out), **{"workers": 1, **config}),
        rich.console.Console(file=printed, width=1000),
    )
    return printed.getvalue()


def start_pack(src: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """`salt-data pack` as a process of its own."""
    command = [
        sys.executable,
        "-c",
        "from salt_distill.programs import data; data()",
        "pack",
        str(src),
        str(out),
        "--workers",
        "1",
        *more,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples_of(data: Path, split: str = "all") -> dict[str, Sample]:
    return {sample.key: sample for shard in open_dataset(data).samples(split) for sample in shard}


def new_reader(data: Path, *, view: ViewConfig = VIEW, split: str = "train", **loader) -> Reader:
    return Reader(
        str(data), data_seed=0, views="fresh", view=view, split=split, loader=LoaderConfig(**loader)
    )


def grey_video(*levels: int, fps: float = 5, size: tuple[int, int] = (16, 32)) -> bytes:
    """A video whose frame i has the grey ``levels[i]``; ``size`` is height and width."""
    frames = [
        av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24") for level in levels
    ]
    return encode_mp4(frames, width=size[1], height=size[0], fps=fps, crf=8)


def encoded_image(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


VIDEO = grey_video(*range(0, 240, 20))
"""Twelve frames, each lighter than the one before it."""


def write(path: Path, data: bytes | str = VIDEO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def skipped(out: Path) -> dict[str, str]:
    """File name -> reason."""
    return {Path(path).name: reason for path, reason in read_skipped(out)}
