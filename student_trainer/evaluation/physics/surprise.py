"""The surprise of a model over the windows of a video (arXiv:2509.24317, Eq. 2)."""

from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

Windows = UInt8[np.ndarray, "b t h w 3"]


class SurpriseModel(Protocol):
    """What can be surprised. Its tokens are time-major."""

    def targets(self, windows: Windows, /) -> Float[Tensor, "b n d"]:
        """What is there: the teacher's latents of whole windows, or normalised pixels."""
        ...

    def predictions(self, windows: Windows, context: int, /) -> Float[Tensor, "b k d"]:
        """What is expected, from the first ``context`` frames alone, of all tokens after them."""
        ...


def surprise(
    model: SurpriseModel,
    video: UInt8[np.ndarray, "t h w 3"],
    *,
    window: int,
    contexts: list[int],
    stride: int,
    batch_size: int,
) -> np.ndarray:
    """``S_t`` as float64 ``[contexts, windows]``: the mean absolute error over the future's tokens and their
    channels, a row per context length."""
    starts = range(0, len(video) - window + 1, stride)
    columns = []
    for first in range(0, len(starts), batch_size):
        windows = np.stack([video[start : start + window] for start in starts[first : first + batch_size]])
        targets = model.targets(windows)
        rows = []
        for context in contexts:
            predictions = model.predictions(windows, context)
            rows.append(
                (predictions - targets[:, -predictions.shape[1] :]).abs().mean((1, 2)).double().cpu().numpy()
            )
        columns.append(np.stack(rows))
    return np.concatenate(columns, axis=1)
