"""The report's sections that show a clip: masks, what stage 1 paints, what encoders make of it."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from salt_distill.common.config import FrozenConfig, LoaderConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import (
    CheckpointConfig,
    load_predictor,
    load_vit,
    open_encoder,
    read_config,
)
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.pictures import (
    CONTEXT,
    DROPPED,
    DROPPED_COLOUR,
    TARGET,
    TARGET_COLOUR,
    describe,
    strip,
    tint_masks,
    token_roles,
)
from salt_distill.student_trainer.evaluation import panels
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun
from salt_distill.student_trainer.evaluation.reconstruction import masks_of, png, reconstruct
from salt_distill.student_trainer.evaluation.report.blocks import (
    Block,
    ColourKey,
    Columns,
    Heading,
    Paragraph,
    Picture,
    Section,
)

_COARSE = 4
"""Tokens along a side of a frame that are large enough in a small picture."""


@dataclass(frozen=True, kw_only=True)
class ClipOfRun:
    """The clip that a run's pictures are of."""

    key: str
    pixels: UInt8[np.ndarray, "t h w 3"]
    config: CheckpointConfig
    """Of the run."""
    masks: MaskGroup
    """That the run drew in its last step."""


def clip_of(run: FinishedRun) -> ClipOfRun:
    """The evaluation view of a run's first sample that can be decoded, among a few. Raises ValueError where
    there is none."""
    data = Path(run.settings.data)
    if not data.is_dir():
        raise ValueError(f"the data set of {run.name}, {data}, is not there (looked from {Path.cwd()})")
    config = read_config(run.path)
    loader, split = LoaderConfig(), run.settings.split
    with closing(
        Reader(str(data), data_seed=0, views=1, view=config.view, split=split, loader=loader)
    ) as reader:
        samples = list(itertools.islice(itertools.chain.from_iterable(reader.samples), 8))
        batch = reader.evaluation(samples)
    for sample, pixels, good in zip(samples, batch.pixels, batch.good, strict=True):
        if good:
            return ClipOfRun(key=sample.key, pixels=pixels, config=config, masks=_masks(run, config))
    raise ValueError(f"none of the first clips of {data} can be decoded")


def masks(run: FinishedRun, clip: ClipOfRun) -> Section:
    """The run's masks on a real clip."""
    config, pixels = clip.config, clip.pixels
    tubelet = config.encoder.tubelet_size
    pictures = []
    for mask_set, mask in zip(config.mask.sets, clip.masks.sets, strict=True):
        roles = token_roles(mask, 0, config.grid.num_tokens)
        seen, predicted, neither = (int((roles == role).sum()) for role in (CONTEXT, TARGET, DROPPED))
        caption = f"{describe(mask_set)}: {seen} tokens seen, {predicted} predicted, {neither} neither"
        pictures.append(_picture(tint_masks(pixels, roles, config.grid), tubelet, caption))
    dropped = "neither: cut off so that all clips of a mask group keep equally many"
    explained = (
        f"What the run {run.name} hid of a real clip in step {config.step}. "
        "Every set is drawn for every clip; a frozen teacher never sees them."
    )
    caption = f"The clip {clip.key}: the first frame of each of its {config.grid.t} tubelets"
    return Section(
        "Masks",
        [
            Paragraph(explained),
            *_row([_picture(pixels, tubelet, caption)], config),
            ColourKey(
                [(TARGET_COLOUR, "predicted (the rest, as it is, is seen)"), (DROPPED_COLOUR, dropped)]
            ),
            *_row(pictures, config),
        ],
    )


def reconstruction(run: FinishedRun, clip: ClipOfRun) -> Section:
    """What a V-Pixel run paints into its masks."""
    encoder, predictor = load_vit(run.path), load_predictor(run.path)
    columns = []
    for set_idx, (mask_set, mask) in enumerate(zip(clip.config.mask.sets, clip.masks.sets, strict=True)):
        painted = reconstruct(
            clip.pixels,
            mask,
            0,
            set_idx,
            encoder=encoder,
            predictor=predictor,
            config=clip.config,
            pixel_norm=run.settings.pixel_norm,
        )
        frames = {
            "Visible input": painted.visible,
            "Prediction": painted.prediction,
            "Original": clip.pixels,
        }
        tubelet = clip.config.encoder.tubelet_size
        pictures = [_picture(pixels, tubelet, title) for title, pixels in frames.items()]
        columns.append([Heading(describe(mask_set)), *_row(pictures, clip.config, beside=False)])
    explained = (
        f"What the run {run.name} paints into the hidden cubes from the visible ones. It predicts normalised"
        " pixels: the mean and the deviation of each cube are taken from the input, so a cube's brightness"
        " and contrast are given, and only its pattern is the model's."
    )
    blocks = list(itertools.chain(*columns)) if _is_fine(clip.config) else [Columns(columns)]
    return Section("V-Pixel reconstruction", [Paragraph(explained), *blocks])


def latents(
    clip: ClipOfRun, runs: Sequence[FinishedRun], teachers: Mapping[str, Sequence[FinishedRun | None]]
) -> Section:
    """What encoders make of a clip: components over time, and where students' predictions agree with their
    teachers."""
    same = [run for run in runs if read_config(run.path).view.clip_shape == clip.pixels.shape]
    tubelet = clip.config.encoder.tubelet_size
    pictures = [_picture(clip.pixels, tubelet, f"The clip {clip.key}")]
    for run in same:
        encoder = open_encoder(FrozenConfig(ckpt=str(run.path)))
        pictures += [_panel(panel) for panel in panels.components(encoder, clip.pixels[None])]
    agreements = []
    for run in same:
        for teacher in filter(None, teachers[run.name]):
            group = _masks(run, read_config(run.path))
            [predicted] = panels.predictions(
                run.path, run.name, group, clip.pixels[None], teacher=str(teacher.path)
            )
            agreements += [_panel(panel) for panel in predicted]
    blocks: list[Block] = [
        Paragraph(
            "The first three principal components of each encoder's tokens as colours: patterns compare"
            " between encoders, colours do not."
        ),
        *_row(pictures, clip.config),
    ]
    if agreements:
        explained = (
            "How close the prediction of each hidden token came to its teacher's latent: dark at a cosine of"
            " 0, yellow at 1. What the student saw is grey."
        )
        blocks += [
            Heading("Predictions against targets"),
            Paragraph(explained),
            *_row(agreements, clip.config),
        ]
    return Section("Latents", blocks)


def _masks(run: FinishedRun, config: CheckpointConfig) -> MaskGroup:
    settings = run.settings
    return masks_of(config, seed=settings.seed, step=config.step, batch_size=settings.batch_size)


def _is_fine(config: CheckpointConfig) -> bool:
    """Whether tokens are too small to be told apart in a picture of half the page's width."""
    return max(config.grid.h, config.grid.w) > _COARSE


def _row(pictures: Sequence[Picture], config: CheckpointConfig, *, beside: bool = True) -> list[Block]:
    """Pictures side by side where ``beside``; of many tokens each at full size, below each other."""
    if _is_fine(config):
        return [replace(picture, full_size=True) for picture in pictures]
    return [Columns([[picture] for picture in pictures])] if beside else [*pictures]


def _picture(pixels: UInt8[np.ndarray, "t h w 3"], tubelet_size: int, caption: str) -> Picture:
    return Picture(png(strip(pixels, tubelet_size)), caption)


def _panel(panel: panels.Panel) -> Picture:
    return _picture(panel.frames, panel.tubelet_size, panel.title)
