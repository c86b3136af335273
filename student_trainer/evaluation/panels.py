"""A clip in other forms: an encoder's components, masks, what stage 1 paints, where a student's predictions
agree with their targets."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from salt_distill.common.config import FrozenConfig, TeacherComputeConfig, load_yaml
from salt_distill.common.devices import device_here
from salt_distill.common.model.checkpoint import (
    CheckpointConfig,
    load_predictor,
    load_vit,
    open_encoder,
    read_config,
)
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.pictures import describe, tint_masks, token_roles
from salt_distill.student_trainer.evaluation.feature_pictures import (
    agreement,
    paint,
    paint_agreement,
    pca_colours,
)
from salt_distill.student_trainer.evaluation.finished_runs import RunSettings
from salt_distill.student_trainer.evaluation.probe.features import EncoderOnDevice
from salt_distill.student_trainer.evaluation.reconstruction import reconstruct


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A clip in one form."""

    title: str
    frames: UInt8[np.ndarray, "t h w 3"]
    tubelet_size: int


def components(encoder: FrozenEncoder, clips: UInt8[np.ndarray, "b t h w 3"]) -> Iterator[Panel]:
    """For each clip the principal components of an encoder's tokens over time; those of all clips
    together."""
    device = device_here()
    tokens = (
        EncoderOnDevice(encoder, encoder.load(), device, batch_size=1, bfloat16=False)
        .tokens(clips[:, None], 1)[:, 0]
        .cpu()
    )
    for clip, colours in zip(clips, pca_colours(tokens), strict=True):
        yield Panel(
            title=f"{encoder.name}: first three principal components",
            frames=paint(colours, encoder.grid, clip.shape[:3]),
            tubelet_size=encoder.config.tubelet_size,
        )


def masks(
    name: str, config: CheckpointConfig, group: MaskGroup, clips: UInt8[np.ndarray, "b t h w 3"]
) -> Iterator[list[Panel]]:
    """For each clip what a run's mask sets hide of it."""
    for row, clip in enumerate(clips):
        yield [
            _panel(
                f"masks of {name}: {describe(mask_set)}",
                tint_masks(clip, token_roles(mask, row, config.grid.num_tokens), config.grid),
                config,
            )
            for mask_set, mask in zip(config.mask.sets, group.sets, strict=True)
        ]


def paintings(
    path: Path, name: str, group: MaskGroup, clips: UInt8[np.ndarray, "b t h w 3"]
) -> Iterator[list[Panel]]:
    """For each clip what a run of stage 1 paints under each mask set."""
    config = read_config(path)
    encoder, predictor, pixel_norm = (
        load_vit(path),
        load_predictor(path),
        RunSettings.model_validate(load_yaml(path / "config.yaml")).pixel_norm,
    )
    for row, clip in enumerate(clips):
        yield [
            _panel(
                f"{name} paints, {describe(mask_set)} (each cube's mean and deviation are the input's)",
                reconstruct(
                    clip,
                    mask,
                    row,
                    set_idx,
                    encoder=encoder,
                    predictor=predictor,
                    config=config,
                    pixel_norm=pixel_norm,
                ).prediction,
                config,
            )
            for set_idx, (mask_set, mask) in enumerate(zip(config.mask.sets, group.sets, strict=True))
        ]


def predictions(
    path: Path, name: str, group: MaskGroup, clips: UInt8[np.ndarray, "b t h w 3"], *, teacher: str
) -> Iterator[list[Panel]]:
    """For each clip how far a student's predictions agree with its teacher's targets, under each mask set.

    Raises ValueError where it learned from another teacher.
    """
    config = read_config(path)
    choice = FrozenConfig(
        ckpt=teacher,
        num_frames=config.view.num_frames,
        crop_size=config.view.crop_size,
        patch_size=config.encoder.patch_size,
        tubelet_size=config.encoder.tubelet_size,
    )
    frozen = Teacher(open_encoder(choice), TeacherComputeConfig(batch_size=1), torch.device("cpu"))
    config.require_teacher(frozen.spec.fingerprint, path, teacher)
    encoder, predictor = load_vit(path), load_predictor(path, frozen.spec.fingerprint)
    of_several = f" of {frozen.spec.name}" if len(config.teacher_fingerprint) > 1 else ""
    for row, clip in enumerate(clips):
        target = frozen.forward(clip[None])
        pixels = normalise(torch.from_numpy(clip)[None], config.mean, config.std)
        panels = []
        for set_idx, (mask_set, mask) in enumerate(zip(config.mask.sets, group.sets, strict=True)):
            cosine = agreement(
                pixels, target, mask, row, set_idx, encoder=encoder, predictor=predictor, grid=config.grid
            )
            title = (
                f"{name} predicts{of_several}, {describe(mask_set)}: cosine with the target, mean"
                f" {cosine.nanmean():.2f}"
            )
            panels.append(_panel(title, paint_agreement(cosine, clip, config.grid), config))
        yield panels


def _panel(title: str, frames: UInt8[np.ndarray, "t h w 3"], config: CheckpointConfig) -> Panel:
    return Panel(title=title, frames=frames, tubelet_size=config.encoder.tubelet_size)
