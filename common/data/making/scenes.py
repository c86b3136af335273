"""Pairs of possible and impossible videos made here, in IntPhys's folders: what a model of intuitive physics
should tell apart."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from rich.progress import track

from salt_distill.common.config import ScenesConfig
from salt_distill.common.draws import uniforms
from salt_distill.common.whole import write_whole

RADIUS = 0.09
"""Of the ball. Lengths are shares of the frame's side; x points right, y down."""
FLOOR = 0.8
SCREEN = (0.36, 0.3, 0.64, 0.9)
"""(left, top, right, bottom) of the screen, behind which the ball is out of sight when half of its way is
done."""
WALL = (0.5, 0.45, 0.55, FLOOR)
TABLE = 0.6
"""Height of the table's top."""
LANES = (0.45, 0.75)
"""Heights at which the ball may go where the screen hides a jump."""
START, WAY = 0.1, 0.8
"""Where the ball begins, and how far it goes."""
GRAVITY = 6.0
"""Frame sides over the square of the whole video's duration."""


@dataclass(frozen=True)
class Thing:
    """A ball or a box at a place."""

    x: float
    y: float
    colour: Float[np.ndarray, " 3"]
    shape: Literal["ball", "box"] = "ball"


def make_scenes(config: ScenesConfig) -> None:
    """Writes ``PROPERTY/NUMBER/1..4/scene/scene_001.png`` and ``status.json``: two possible and two
    impossible videos each, in a drawn order.

    Raises ValueError for a folder in use.
    """
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"got OUT {out}, which is not empty, expected a new folder")
    jobs = [(name, number) for name in PROPERTIES for number in range(config.num_scenes)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(track(pool.map(_write, [config] * len(jobs), jobs), total=len(jobs), description="scenes"))


def scene(config: ScenesConfig, name: str, number: int) -> list[tuple[bool, UInt8[np.ndarray, "t h w 3"]]]:
    """The four videos of a scene, and whether each is possible; a function of (seed, name, number)."""
    draw = iter(uniforms(config.seed, f"scene {name}", number, 32))
    colours = [
        np.array([0.55 + 0.45 * next(draw) for _ in range(3)]),
        np.array([0.55 + 0.45 * next(draw) for _ in range(3)]),
    ]
    colours[1][int(next(draw) * 3)] *= 0.3  # so that the second colour is told from the first
    ground = np.array([0.1 + 0.3 * next(draw) for _ in range(3)])
    stuff = np.array([0.3 + 0.3 * next(draw) for _ in range(3)])
    mirrored, order = next(draw) < 0.5, np.argsort([next(draw) for _ in range(4)])
    videos = []
    for possible, frames in PROPERTIES[name](config, colours, ground, stuff):
        videos.append((possible, frames[:, :, ::-1] if mirrored else frames))
    return [videos[place] for place in order]


def _write(config: ScenesConfig, job: tuple[str, int]) -> None:
    name, number = job
    for place, (possible, frames) in enumerate(scene(config, name, number), start=1):
        folder = Path(config.out) / name / f"{number + 1:02d}" / str(place)
        (folder / "scene").mkdir(parents=True)
        header = {"is_possible": possible, "block_name": name}
        write_whole(folder / "status.json", json.dumps({"header": header}) + "\n")
        for at, frame in enumerate(frames, start=1):
            Image.fromarray(frame).save(folder / "scene" / f"scene_{at:03d}.png")


Videos = Iterator[tuple[bool, UInt8[np.ndarray, "t h w 3"]]]
Colours = Sequence[Float[np.ndarray, " 3"]]


def _behind_a_screen(world: Callable[[float, int, Colours], Thing | None]) -> Callable[..., Videos]:
    """Two worlds, each possible throughout, and what comes of going over from one to the other while the
    screen hides it."""

    def videos(config: ScenesConfig, colours: Colours, ground: np.ndarray, stuff: np.ndarray) -> Videos:
        for first, second in ((0, 0), (1, 1), (0, 1), (1, 0)):
            shares = _shares(config)
            things = [world(share, first if share < 0.5 else second, colours) for share in shares]
            yield first == second, _film(config, ground, things, over=[(SCREEN, stuff)])

    return videos


def _vanish(share: float, number: int, colours: Colours) -> Thing | None:
    return Thing(START + WAY * share, FLOOR - RADIUS, colours[0]) if number == 0 else None


def _colour(share: float, number: int, colours: Colours) -> Thing:
    return Thing(START + WAY * share, FLOOR - RADIUS, colours[number])


def _shape(share: float, number: int, colours: Colours) -> Thing:
    return Thing(START + WAY * share, FLOOR - RADIUS, colours[0], "ball" if number == 0 else "box")


def _jump(share: float, number: int, colours: Colours) -> Thing:
    return Thing(START + WAY * share, LANES[number], colours[0])


def _wall(config: ScenesConfig, colours: Colours, ground: np.ndarray, stuff: np.ndarray) -> Videos:
    """With a wall the ball comes back, without it the ball passes; the other way round it cannot be."""
    for walled, passes in ((False, True), (True, False), (True, True), (False, False)):
        xs = [START + WAY * share for share in _shares(config)]
        last = WALL[0] - RADIUS
        things = [Thing(x if passes else min(x, 2 * last - x), FLOOR - RADIUS, colours[0]) for x in xs]
        yield walled != passes, _film(config, ground, things, over=[(WALL, stuff)] if walled else [])


def _float(config: ScenesConfig, colours: Colours, ground: np.ndarray, stuff: np.ndarray) -> Videos:
    """On a table the ball rolls on, past its end it falls; the other way round it cannot be."""
    for end, falls in ((1.0, False), (0.5, True), (0.5, False), (1.0, True)):
        things = []
        for share in _shares(config):
            x = START + WAY * share
            fallen = 0.5 * GRAVITY * max(0.0, share - (0.5 - START) / WAY) ** 2 if falls else 0.0
            things.append(Thing(x, TABLE - RADIUS + fallen, colours[0]))
        yield (
            (end < 1) == falls,
            _film(config, ground, things, under=[((0.0, TABLE, end, TABLE + 0.06), stuff)]),
        )


PROPERTIES: dict[str, Callable[..., Videos]] = {
    "vanish": _behind_a_screen(_vanish),
    "colour": _behind_a_screen(_colour),
    "shape": _behind_a_screen(_shape),
    "jump": _behind_a_screen(_jump),
    "wall": _wall,
    "float": _float,
}
"""What is violated: permanence, constancy of colour and of shape, continuity, solidity, gravity."""

Boxes = Sequence[tuple[tuple[float, float, float, float], np.ndarray]]


def _shares(config: ScenesConfig) -> list[float]:
    return [at / (config.num_frames - 1) for at in range(config.num_frames)]


def _film(
    config: ScenesConfig,
    ground: np.ndarray,
    things: Sequence[Thing | None],
    *,
    under: Boxes = (),
    over: Boxes = (),
) -> np.ndarray:
    return np.stack([_frame(config.size, ground, thing, under, over) for thing in things])


def _frame(
    size: int, ground: np.ndarray, thing: Thing | None, under: Boxes, over: Boxes
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture, its edges smoothed over a pixel."""
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size
    image = np.broadcast_to(ground, (size, size, 3)) * (0.8 + 0.4 * (y > FLOOR)[..., None])
    for box, colour in under:
        image = _over(image, _inside(x, y, box, size), colour)
    if thing is not None:
        if thing.shape == "ball":
            cover = np.clip((RADIUS - np.hypot(x - thing.x, y - thing.y)) * size + 0.5, 0, 1)
        else:
            cover = _inside(
                x, y, (thing.x - RADIUS, thing.y - RADIUS, thing.x + RADIUS, thing.y + RADIUS), size
            )
        image = _over(image, cover, thing.colour)
    for box, colour in over:
        image = _over(image, _inside(x, y, box, size), colour)
    return np.rint(255 * image).astype(np.uint8)


def _inside(
    x: np.ndarray, y: np.ndarray, box: tuple[float, float, float, float], size: int
) -> Float[np.ndarray, "h w"]:
    left, top, right, bottom = box
    depth = np.minimum.reduce([x - left, right - x, y - top, bottom - y])
    return np.clip(depth * size + 0.5, 0, 1)


def _over(image: np.ndarray, cover: Float[np.ndarray, "h w"], colour: np.ndarray) -> np.ndarray:
    return image + cover[..., None] * (colour - image)
