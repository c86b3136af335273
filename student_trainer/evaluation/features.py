"""Frozen features: the tokens that an encoder gives for the evaluation view of labelled clips."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from common.config import LoaderConfig, ViewConfig
from common.data.reader import Reader
from common.data.shards import Sample, open_dataset
from common.model.pixels import normalise


@dataclass(frozen=True, kw_only=True)
class LabelledClips:
    """The evaluation view (middle of the video, centre crop, no flip) of samples that can be decoded."""

    pixels: UInt8[np.ndarray, "b t h w 3"]
    labels: dict[str, Int[np.ndarray, " b"]]
    """Class number of each clip."""
    skipped: dict[str, str]
    """Key -> reason, of the samples that could not be decoded; they have no row."""


def labelled_samples(data: str) -> dict[str, list[Sample]]:
    """The samples of each split, shard after shard."""
    splits: dict[str, list[Sample]] = {}
    for shard in open_dataset(data).samples("all"):
        for sample in shard:
            splits.setdefault(sample.split, []).append(sample)
    return splits


def common_labels(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """Names of the labels that every sample carries, and of those that only some do; both sorted."""
    names = [set(sample.labels) for sample in samples]
    everywhere = set[str]().union(names[0]).intersection(*names)
    return sorted(everywhere), sorted(set[str]().union(*names) - everywhere)


def load_clips(data: str, samples: Sequence[Sample], view: ViewConfig, loader: LoaderConfig, labels: Sequence[str]) -> LabelledClips:
    """Decodes the evaluation view of ``samples``. Raises ValueError above ``loader.max_bad_fraction``."""
    reader = Reader(data, data_seed=0, views=1, view=view, split="all", loader=loader)
    batch = reader.evaluation(samples)
    reader.close()
    classes = {name: np.array([sample.labels[name] for sample in samples], dtype=np.int64)[batch.good] for name in labels}
    return LabelledClips(
        pixels=batch.pixels if batch.good.all() else batch.pixels[batch.good], labels=classes, skipped=dict(reader.skipped)
    )


@torch.inference_mode()
def frozen_tokens(
    encoder: nn.Module,
    pixels: UInt8[np.ndarray, "b t h w 3"],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int,
    device: torch.device,
) -> Float[Tensor, "b n e"]:
    """The final-norm tokens of every clip, float32, on ``device``: one forward a clip, in eval mode, without gradient."""
    encoder = encoder.to(device).eval()
    batches = [torch.from_numpy(pixels[first : first + batch_size]).to(device) for first in range(0, len(pixels), batch_size)]
    return torch.cat([encoder(normalise(batch, mean, std)).float() for batch in batches])
