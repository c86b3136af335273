"""Pairs of a possible and an impossible video, from the folders of IntPhys, GRASP and InfLevel."""

import csv
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import ViewConfig
from salt_distill.common.data.segments import centred_box
from salt_distill.common.data.stills import decode_stills
from salt_distill.common.data.video import decode, probe
from salt_distill.common.data.video_facts import VideoFacts
from salt_distill.common.data.views import resize
from salt_distill.common.text_files import read_text

FRAME_STEP = {"intphys": 2, "grasp": 10, "inflevel": 5}
"""Frames of a video from one that is taken to the next."""


@dataclass(frozen=True, kw_only=True)
class PairVideo:
    """A video on disk: a file, or a folder of images."""

    path: Path

    def num_frames(self) -> int:
        """All of its frames. Raises BadVideoError."""
        return len(self._images()) if self.path.is_dir() else self._facts.num_frames

    @functools.cached_property
    def _facts(self) -> VideoFacts:
        return probe(self.path.read_bytes())

    def frames(self, idx: Sequence[int], num_frames: int) -> Sequence[UInt8[np.ndarray, "h w 3"]]:
        """The frames asked for. Raises BadVideoError."""
        if self.path.is_dir():
            images = self._images()
            return list(
                decode_stills([memoryview(images[number].read_bytes()) for number in idx], range(len(idx)))
            )
        return list(decode(self.path.read_bytes(), idx, num_frames, seekable=self._facts.seekable))

    def _images(self) -> list[Path]:
        found = sorted(self.path.glob("scene_*.png")) or sorted(self.path.glob("*.png"))
        if not found:
            raise BadVideoError(f"{self.path} holds no images")
        return found


@dataclass(frozen=True, kw_only=True)
class VideoPair:
    """Two videos that are alike until something happens."""

    property: str
    """What one of them violates."""
    name: str
    possible: PairVideo
    impossible: PairVideo
    first: tuple[int, int] = (0, 0)
    """The first frames to be taken of each, before their lengths are made equal."""
    whole_frame: bool = False
    """Squash the frame instead of taking its middle."""
    whole_steps: bool = False
    """Take only frames that a whole step follows: 49 of IntPhys's 100."""


def intphys(folder: Path) -> list[VideoPair]:
    """Two pairs of each scene ``PROPERTY/SCENE/1..4``: an impossible video goes with the possible one that it
    leaves last."""
    pairs = []
    for scene in sorted(path for path in folder.glob("*/*") if (path / "1" / "scene").is_dir()):
        films: dict[bool, list[PairVideo]] = {True: [], False: []}
        for video in sorted(path for path in scene.iterdir() if (path / "status.json").is_file()):
            films[json.loads(read_text(video / "status.json"))["header"]["is_possible"]].append(
                PairVideo(path=video / "scene")
            )
        if len(films[True]) != 2 or len(films[False]) != 2:
            raise ValueError(
                f"{scene}: got {len(films[True])} possible and {len(films[False])} impossible videos,"
                " expected 2 and 2, each with a status.json: IntPhys's `dev` set has them, its `test` set"
                " has not"
            )
        (a, b), (one, other) = films[True], films[False]
        straight = _alike(a, one) + _alike(b, other) >= _alike(a, other) + _alike(b, one)
        for number, (possible, impossible) in enumerate(
            zip((a, b), (one, other) if straight else (other, one), strict=True), start=1
        ):
            name = f"{scene.parent.name}/{scene.name}/{number}"
            pairs.append(
                VideoPair(
                    property=scene.parent.name,
                    name=name,
                    possible=possible,
                    impossible=impossible,
                    whole_steps=True,
                )
            )
    return pairs


def _alike(first: PairVideo, second: PairVideo) -> int:
    """Frames before the first that differs."""
    num_frames = min(first.num_frames(), second.num_frames())
    for number in range(num_frames):
        one, other = (film.frames([number], num_frames)[0] for film in (first, second))
        if one.shape != other.shape or (one != other).any():
            return number
    return num_frames


def grasp(folder: Path) -> list[VideoPair]:
    """``P_PROPERTY/NAME`` with ``IP_PROPERTY/NAME``."""
    pairs = []
    for possible in sorted(folder.glob("P_*")):
        impossible = folder / f"I{possible.name}"
        names = [
            {path.name for path in side.iterdir() if path.is_file()} if side.is_dir() else set()
            for side in (possible, impossible)
        ]
        if names[0] != names[1]:
            raise ValueError(
                f"{impossible}: got {len(names[1])} videos, expected the {len(names[0])} names of {possible}"
            )
        for name in sorted(names[0]):
            property_name = possible.name.removeprefix("P_")
            pairs.append(
                VideoPair(
                    property=property_name,
                    name=f"{property_name}/{name}",
                    possible=PairVideo(path=possible / name),
                    impossible=PairVideo(path=impossible / name),
                )
            )
    return pairs


def inflevel(folder: Path) -> list[VideoPair]:
    """The rows of ``PROPERTY.csv``; a video begins after it showed what the objects are."""
    pairs = []
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines), start=1):
                sides = (1, 2) if row["vid1_label"] == "possible" else (2, 1)
                films = [PairVideo(path=folder / row[f"vid{side}_path"]) for side in sides]
                first = tuple(int(row[f"vid{side}_end_priming_2"]) + 1 for side in sides)
                pairs.append(
                    VideoPair(
                        property=file.stem,
                        name=f"{file.stem}/{number}",
                        possible=films[0],
                        impossible=films[1],
                        first=(first[0], first[1]),
                        whole_frame=True,
                    )
                )
    return pairs


def pairs_hash(pairs: Sequence[VideoPair]) -> str:
    """Which pairs these are: sha256 of their names, and of the names and sizes of their files."""
    hasher = hashlib.sha256()
    for pair in sorted(pairs, key=lambda pair: pair.name):
        hasher.update(f"{pair.property}\n{pair.name}\n".encode())
        for video in (pair.possible, pair.impossible):
            for path in sorted(video.path.glob("*.png")) if video.path.is_dir() else [video.path]:
                hasher.update(f"{path.name} {path.stat().st_size if path.exists() else 0}\n".encode())
    return hasher.hexdigest()


LAYOUTS: dict[str, Callable[[Path], list[VideoPair]]] = {
    "intphys": intphys,
    "grasp": grasp,
    "inflevel": inflevel,
}


def read_pair(
    pair: VideoPair, frame_step: int, view: ViewConfig
) -> tuple[UInt8[np.ndarray, "t h w 3"], UInt8[np.ndarray, "t h w 3"]]:
    """The frames that are taken of both videos, of a clip's size, equally many: of the longer one the first
    are left out. Raises BadVideoError."""
    films = (pair.possible, pair.impossible)
    lengths = [film.num_frames() for film in films]
    left = min(length - first for length, first in zip(lengths, pair.first, strict=True))
    clips = []
    for film, length in zip(films, lengths, strict=True):
        end = length - left + (left - 1) // frame_step * frame_step if pair.whole_steps else length
        frames = film.frames(range(length - left, end, frame_step), length)
        if not pair.whole_frame:
            height, width, _ = frames[0].shape
            top, start, high, wide = centred_box(view, height, width, 0.5, 1.0)
            frames = [frame[top : top + high, start : start + wide] for frame in frames]
        clips.append(resize(list(frames), view.height, view.width))
    return clips[0], clips[1]
