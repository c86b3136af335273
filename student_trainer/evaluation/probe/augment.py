"""The training clips of V-JEPA 2's probes: RandAugment, AutoAugment, erased rectangles."""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from salt_distill.common.clip import clip_digest
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.data.views import Frames, crop_box
from salt_distill.common.model.pixels import IMAGENET_MEAN, IMAGENET_STD

ERASE_PROBABILITY = 0.25
ERASE_AREA = (0.02, 1 / 3)
"""Range of a rectangle's share of the clip's area."""
ERASE_ASPECT = (0.3, 1 / 0.3)
"""Range of its height over width."""
RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
AUTO_AUGMENT = "original"
EVAL_RESIZE = 256 / 224
"""Sides of an image, resized to cover a clip, over those of its middle that is scored."""


@dataclass(frozen=True)
class AugmentedVideoCut(SegmentCut):
    """Clips of a training video: each segment changed by RandAugment, then cropped, then a rectangle erased
    in a quarter of them. One change for all frames of a segment."""

    seeds: tuple[int, ...] = ()
    """One for each segment."""

    def clip(self, frames: Frames) -> tuple[UInt8[np.ndarray, "t rows columns 3"], bytes]:
        """Every clip, and the digest of all."""
        t = self.view.num_frames
        changed = [
            frame
            for number, seed in enumerate(self.seeds)
            for frame in rand_augment(frames[number * t : (number + 1) * t], seed)
        ]
        pixels, _ = super().clip(changed)
        for number, seed in enumerate(self.seeds):
            erase(pixels[number * t : (number + 1) * t], seed)
        return pixels, clip_digest(pixels)


@dataclass(frozen=True)
class ImageCut(SegmentCut):
    """An image, repeated as the frames of a clip. Resized with antialias, as torchvision resizes images."""

    seed: int | None = None
    """Of a training image: cropped, mirrored, changed by AutoAugment, a rectangle erased. None: its
    middle."""

    def clip(self, frames: Frames) -> tuple[UInt8[np.ndarray, "t rows columns 3"], bytes]:
        """The clip, and its digest."""
        image = Image.fromarray(np.ascontiguousarray(frames[0]))
        pixels = self._middle(image) if self.seed is None else self._drawn(image, self.seed)
        clip = np.repeat(pixels[None], self.view.num_frames, axis=0)
        return clip, clip_digest(clip)

    def _middle(self, image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
        high, wide = (int(size * EVAL_RESIZE) for size in (self.view.height, self.view.width))
        if image.width * high < image.height * wide:
            high = int(wide * image.height / image.width)
        else:
            wide = int(high * image.width / image.height)
        resized = image.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = round((wide - self.view.width) / 2), round((high - self.view.height) / 2)
        return np.asarray(resized.crop((left, top, left + self.view.width, top + self.view.height)))

    def _drawn(self, image: Image.Image, seed: int) -> UInt8[np.ndarray, "h w 3"]:
        draw = self.draws[0]
        top, left, height, width = crop_box(self.view, image.height, image.width, draw)
        cropped = image.crop((left, top, left + width, top + height))
        cropped = cropped.resize((self.view.width, self.view.height), Image.Resampling.BICUBIC)
        if draw.flip < 0.5:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.array(_seeded(seed, _auto_augment(), cropped))
        erase(pixels[None], seed)
        return pixels


def rand_augment(frames: Frames, seed: int) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Four changes of fifteen, each with probability one half and of magnitude 7 or so, the same for all
    frames: timm's functions, which V-JEPA 2's are a copy of."""
    return [
        np.asarray(_seeded(seed, _rand_augment(), Image.fromarray(np.ascontiguousarray(frame))))
        for frame in frames
    ]


def erase(clip: UInt8[np.ndarray, "t h w 3"], seed: int) -> None:
    """Fills a rectangle of the clip, the same in each frame, with noise, in a quarter of the cases.

    The noise is normal in the normalised space, rounded and clamped to what a pixel can be (the reference
    erases after normalisation, and clamps nothing).
    """
    draws = random.Random(seed)
    _, height, width, _ = clip.shape
    if draws.random() > ERASE_PROBABILITY:
        return
    for _ in range(100):
        area = draws.uniform(*ERASE_AREA) * height * width
        aspect = math.exp(draws.uniform(*map(math.log, ERASE_ASPECT)))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if high < height and wide < width:
            top, left = draws.randint(0, height - high), draws.randint(0, width - wide)
            noise = np.random.default_rng(seed).standard_normal((len(clip), high, wide, 3))
            values = 255 * (np.array(IMAGENET_MEAN) + np.array(IMAGENET_STD) * noise)
            clip[:, top : top + high, left : left + wide] = values.round().clip(0, 255)
            return


def _seeded(seed: int, change: Callable[[Image.Image], Image.Image], image: Image.Image) -> Image.Image:
    """A change of timm's, whose draws come from the global generators: those are put back afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        return change(image)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@functools.cache
def _rand_augment() -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform  # timm takes a second to import

    return rand_augment_transform(RAND_AUGMENT, {"interpolation": Image.Resampling.BICUBIC})


@functools.cache
def _auto_augment() -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import auto_augment_transform

    mean_colour = tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN)
    return auto_augment_transform(
        AUTO_AUGMENT, {"interpolation": Image.Resampling.BICUBIC, "img_mean": mean_colour}
    )
