"""The encoders that a command judges: what `--ckpt` names, each on its clips, and one with fresh weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from salt_distill.common.config import TIMM_RANDOM, CropSize, EncoderConfig, FrozenConfig
from salt_distill.common.draws import words
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.vit import Encoder, init_weights

RANDOM_INIT = "random-init"


def open_candidates(
    paths: Sequence[str],
    num_frames: int | None,
    crop_size: CropSize | None,
    frame_step: int | None,
    *,
    random_seed: int | None = None,
) -> list[FrozenEncoder]:
    """The encoders that these name, each once, on clips that are as asked for; named after their runs.

    ``random_seed``: before them one like the first with fresh weights of this seed, ``RANDOM_INIT``.
    """
    names = [checkpoint_name(path) for path in paths]
    names = [path if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"got --ckpt {', '.join(paths)}, expected every checkpoint once")
    candidates = []
    for path, name in zip(paths, names, strict=True):
        encoder = open_encoder(FrozenConfig(ckpt=path, num_frames=num_frames, crop_size=crop_size))
        view = encoder.view.model_copy(update={} if frame_step is None else {"frame_step": frame_step})
        candidates.append(dataclasses.replace(encoder, name=name, view=view))
    fresh = [] if random_seed is None else [_with_fresh_weights(candidates[0], random_seed)]
    return [*fresh, *candidates]


def _with_fresh_weights(like: FrozenEncoder, seed: int) -> FrozenEncoder:
    """An encoder of the same architecture that has learned nothing."""
    architecture = like.config
    if not isinstance(architecture, EncoderConfig):
        raise ValueError(
            f"got --random-init with {like.name} first, expected a video ViT there: for timm's give --ckpt"
            f" {TIMM_RANDOM}NAME"
        )

    def load() -> nn.Module:
        encoder = Encoder(architecture)
        init_weights(
            encoder,
            torch.Generator().manual_seed(int(words(seed, RANDOM_INIT, 0, 1)[0] >> np.uint64(1))),
            std=like.init_std,
        )
        return encoder

    return dataclasses.replace(like, name=RANDOM_INIT, load=load)


def checkpoint_name(path: str) -> str:
    """A run directory's name; a checkpoint's with its run's in front."""
    resolved = Path(path.partition("?")[0]).resolve()  # an address may have options
    return (
        f"{resolved.parents[1].name}/{resolved.name}"
        if resolved.parent.name == "checkpoints"
        else resolved.name
    )
