"""What is surprised: an encoder and what predicts from its tokens, latents or pixels."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from salt_distill.common.config import CropSize, FrozenConfig, TeacherComputeConfig, ViewConfig, load_yaml
from salt_distill.common.devices import device_here
from salt_distill.common.model.checkpoint import (
    find_checkpoint,
    load_module,
    load_predictor,
    load_vit,
    on_this_machine,
    open_encoder,
    read_config,
)
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.hugging_face import hf_model_type
from salt_distill.common.model.pixels import normalise, pixel_targets
from salt_distill.common.model.teacher import Teacher, fingerprint
from salt_distill.common.model.videomae import load_videomae_decoder
from salt_distill.student_trainer.evaluation.finished_runs import RunSettings
from salt_distill.student_trainer.evaluation.physics.surprise import Windows
from salt_distill.student_trainer.evaluation.records import EncoderIdentity

Predict = Callable[[Float[Tensor, "b v e"], Int[Tensor, "b v"], Int[Tensor, "b k"]], Float[Tensor, "b k d"]]
"""From visible tokens, their numbers and those of hidden ones, to what is expected there."""


@dataclass(frozen=True, kw_only=True)
class ContextPredictor:
    """A ``SurpriseModel``: an encoder that is given the context alone, and what predicts the rest."""

    identity: EncoderIdentity
    """Of the encoder; the view is that of a window."""
    teacher_fingerprint: str | None
    """Of the encoder whose latents are predicted; none where pixels are."""
    run_fingerprint: str
    """By which its run is known: the encoder's; of a baseline its moving average's."""
    encoder: nn.Module
    predict: Predict
    targets: Callable[[Windows], Float[Tensor, "b n d"]]
    """As in ``SurpriseModel``: latents with a LayerNorm without affine, as in training, or pixels normalised
    within each cube."""
    grid: TokenGrid
    """Of a window."""
    tubelet_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device

    @torch.inference_mode()
    def predictions(self, windows: Windows, context: int) -> Float[Tensor, "b k d"]:
        """As in ``SurpriseModel``."""
        idx = torch.arange(self.grid.num_tokens, device=self.device).expand(len(windows), -1)
        num_seen = context // self.tubelet_size * self.grid.h * self.grid.w
        pixels = normalise(torch.from_numpy(windows).to(self.device), self.mean, self.std)
        visible = self.encoder(pixels, idx[:, :num_seen])
        return self.predict(visible, idx[:, :num_seen], idx[:, num_seen:]).float()


def open_predictor(
    ckpt: str,
    teacher: str | None,
    *,
    window: int,
    crop_size: CropSize | None,
    batch_size: int,
    num_threads: int,
) -> ContextPredictor:
    """A student with the teacher that its checkpoint names, a baseline with its moving average, a stage 1 or
    a VideoMAE directory with its decoder of pixels. Raises ValueError where the teacher is another, or
    nothing predicts."""
    opened = open_encoder(FrozenConfig(ckpt=ckpt, num_frames=window, crop_size=crop_size))
    device = device_here()
    if _is_videomae(ckpt):
        _require_teacher(teacher, ckpt, "a VideoMAE", "none: it predicts pixels")
        decoder = load_videomae_decoder(on_this_machine(ckpt)).to(device)
        return _of_pixels(ckpt, opened, opened.load(), decoder, "channel", device)
    objective = read_config(ckpt).objective
    expected = {
        "vpixel": "none: it predicts pixels",
        "vjepa": "none: its targets are a moving average in the checkpoint",
    }.get(objective)
    _require_teacher(teacher, ckpt, f"a run of {objective}", expected)
    encoder, grid = load_vit(ckpt), opened.grid
    if objective == "vpixel":
        predict = functools.partial(load_predictor(ckpt).to(device), grid=grid, mask_set=0)
        return _of_pixels(ckpt, opened, encoder, predict, _pixel_norm(ckpt), device)
    frozen = _teacher(ckpt, teacher, opened.view, batch_size, num_threads, device)
    predictor = load_predictor(ckpt, None if teacher is None else frozen.spec.fingerprint).to(device)
    predict = functools.partial(predictor, grid=grid, mask_set=0)
    if objective == "vjepa":
        load_module(encoder, find_checkpoint(ckpt), "online.safetensors")  # the encoder that learned
    return _context_predictor(
        ckpt,
        opened,
        encoder,
        predict,
        frozen.forward,
        device,
        teacher_fingerprint=frozen.spec.fingerprint,
        run_fingerprint=frozen.spec.fingerprint if objective == "vjepa" else None,
    )


def _require_teacher(teacher: str | None, ckpt: str, kind: str, expected: str | None) -> None:
    if (teacher is None) == (expected is None):
        expected = expected or "--teacher, the frozen encoder that it learned from"
        raise ValueError(f"{ckpt}: got --teacher {teacher} for {kind}, expected {expected}")


def _teacher(
    ckpt: str, teacher: str | None, view: ViewConfig, batch_size: int, num_threads: int, device: torch.device
) -> Teacher:
    """What a student learned from, or a baseline's moving average, on windows like ``view``."""
    config = read_config(ckpt)
    choice = FrozenConfig(
        ckpt=teacher or ckpt,
        num_frames=view.num_frames,
        crop_size=view.crop_size,
        patch_size=config.encoder.patch_size,
        tubelet_size=config.encoder.tubelet_size,
    )
    compute = TeacherComputeConfig(batch_size=batch_size, num_threads=num_threads)
    frozen = Teacher(open_encoder(choice), compute, device)
    if teacher is not None:
        config.require_teacher(frozen.spec.fingerprint, ckpt, teacher)
    return frozen


def _of_pixels(
    ckpt: str, opened: FrozenEncoder, encoder: nn.Module, predict: Predict, norm: str, device: torch.device
) -> ContextPredictor:
    """Of what predicts pixels normalised within each cube."""
    config, grid = opened.config, opened.grid

    def targets(windows: Windows) -> Float[Tensor, "b n d"]:
        pixels = torch.from_numpy(windows).to(device)
        idx = torch.arange(grid.num_tokens, device=device).expand(len(windows), -1)
        return pixel_targets(
            pixels, idx, patch_size=config.patch_size, tubelet_size=config.tubelet_size, norm=norm
        )

    return _context_predictor(ckpt, opened, encoder, predict, targets, device, teacher_fingerprint=None)


def _context_predictor(
    ckpt: str,
    opened: FrozenEncoder,
    encoder: nn.Module,
    predict: Predict,
    targets: Callable[[Windows], Float[Tensor, "b n d"]],
    device: torch.device,
    *,
    teacher_fingerprint: str | None,
    run_fingerprint: str | None = None,
) -> ContextPredictor:
    """``run_fingerprint``: None for the encoder's own."""
    of_encoder = fingerprint(open_encoder(FrozenConfig(ckpt=ckpt)), encoder)
    return ContextPredictor(
        identity=EncoderIdentity(fingerprint=of_encoder, view=opened.view),
        teacher_fingerprint=teacher_fingerprint,
        run_fingerprint=run_fingerprint or of_encoder,
        encoder=encoder.to(device),
        predict=predict,
        targets=targets,
        grid=opened.grid,
        tubelet_size=opened.config.tubelet_size,
        mean=opened.mean,
        std=opened.std,
        device=device,
    )


def _is_videomae(ckpt: str) -> bool:
    path = on_this_machine(ckpt)
    return path.is_dir() and hf_model_type(path) == "videomae"


def _pixel_norm(ckpt: str) -> str:
    """What a stage 1's pixels were normalised over, from its run's configuration. Raises ValueError for a
    checkpoint without its run."""
    folders = (Path(ckpt), find_checkpoint(ckpt).parent.parent)
    path = next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
    if path is None:
        raise ValueError(
            f"{ckpt}: got a stage 1 without its run's config.yaml, expected the run directory: it says how"
            " the pixels were normalised"
        )
    return RunSettings.model_validate(load_yaml(path)).pixel_norm
