"""The surprise of a student and its predictor against the teacher, over the windows of a video
(arXiv:2509.24317, Eq. 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from salt_distill.common.config import FrozenConfig, TeacherComputeConfig
from salt_distill.common.model.checkpoint import (
    find_checkpoint,
    load_module,
    load_predictor,
    load_vit,
    open_encoder,
    read_config,
)
from salt_distill.common.model.grid import TokenGrid, token_grid
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.teacher import Teacher, fingerprint
from salt_distill.common.model.vit import Encoder
from salt_distill.student_trainer.evaluation.records import EncoderIdentity

Windows = UInt8[np.ndarray, "b t h w 3"]


class SurpriseModel(Protocol):
    """What can be surprised. Its tokens are time-major."""

    def targets(self, windows: Windows) -> Float[Tensor, "b n d"]:
        """What is there: the teacher's latents of whole windows."""
        ...

    def predictions(self, windows: Windows, context: int) -> Float[Tensor, "b k d"]:
        """What is expected, from the first ``context`` frames alone, of all tokens after them."""
        ...


@dataclass(frozen=True, kw_only=True)
class LatentSurprise:
    """An encoder and its predictor, and where the targets come from."""

    identity: EncoderIdentity
    """Of the encoder; the view is that of a window."""
    teacher_fingerprint: str | None
    """Of the encoder whose latents are predicted."""
    encoder: Encoder
    predictor: torch.nn.Module
    grid: TokenGrid
    """Of a window."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    teacher: Callable[[Windows], Float[Tensor, "b n d"]]
    device: torch.device

    def targets(self, windows: Windows) -> Float[Tensor, "b n d"]:
        """As in ``SurpriseModel``: with a LayerNorm without affine, as in training."""
        return self.teacher(windows)

    @torch.inference_mode()
    def predictions(self, windows: Windows, context: int) -> Float[Tensor, "b k d"]:
        """As in ``SurpriseModel``. The encoder is given the tokens of the context and no others; the first
        mask set's token asks for the rest."""
        idx = torch.arange(self.grid.num_tokens, device=self.device).expand(len(windows), -1)
        seen = context // self.encoder.config.tubelet_size * self.grid.h * self.grid.w
        pixels = normalise(torch.from_numpy(windows).to(self.device), self.mean, self.std)
        visible = self.encoder(pixels, idx[:, :seen])
        return self.predictor(visible, idx[:, :seen], idx[:, seen:], grid=self.grid, mask_set=0).float()


def surprise(
    model: SurpriseModel,
    video: UInt8[np.ndarray, "t s s 3"],
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


def open_student(
    ckpt: str, teacher: str | None, *, window: int, crop_size: int | None, batch_size: int, num_threads: int
) -> LatentSurprise:
    """A student, and the teacher that its checkpoint names. Raises ValueError where that is another, or
    none."""
    config = read_config(ckpt)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    view = config.view.model_copy(
        update={"num_frames": window, "crop_size": crop_size or config.view.crop_size}
    )
    compute = TeacherComputeConfig(batch_size=batch_size, num_threads=num_threads)
    encoder = load_vit(ckpt)
    if config.objective == "vpixel":
        raise ValueError(
            f"{ckpt}: got a V-Pixel teacher, expected a student: it predicts pixels normalised by themselves,"
            " no latents"
        )
    if (teacher is None) != (config.objective == "vjepa"):
        expected = (
            "none: its targets are a moving average in the checkpoint"
            if teacher
            else "--teacher, the frozen encoder that it learned from"
        )
        raise ValueError(
            f"{ckpt}: got --teacher {teacher} for a run of {config.objective}, expected {expected}"
        )
    choice = FrozenConfig(
        ckpt=teacher or ckpt,
        num_frames=view.num_frames,
        crop_size=view.crop_size,
        patch_size=config.encoder.patch_size,
        tubelet_size=config.encoder.tubelet_size,
    )
    frozen = Teacher(open_encoder(choice), compute, device)
    if config.objective == "vjepa":
        load_module(encoder, find_checkpoint(Path(ckpt)), "online.safetensors")  # the encoder that learned
    elif frozen.spec.fingerprint != config.teacher_fingerprint:
        raise ValueError(
            f"got --teacher {teacher} with fingerprint {frozen.spec.fingerprint[:12]}, expected"
            f" {(config.teacher_fingerprint or 'none')[:12]}, which {ckpt} learned from"
        )
    return LatentSurprise(
        identity=EncoderIdentity(
            fingerprint=fingerprint(open_encoder(FrozenConfig(ckpt=ckpt)), encoder),
            view=view,
        ),
        teacher_fingerprint=frozen.spec.fingerprint,
        encoder=encoder.to(device),
        predictor=load_predictor(ckpt).to(device),
        grid=token_grid(view, config.encoder),
        mean=config.mean,
        std=config.std,
        teacher=frozen.forward,
        device=device,
    )
