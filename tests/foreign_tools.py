"""Checkpoints of random weights with real head widths, in our format and in others': what the tests of
foreign checkpoints share."""

from pathlib import Path

import rich.console
import torch

from salt_distill.common.config import EncoderConfig, ExportConfig, MaskConfig, PredictorConfig, ViewConfig
from salt_distill.common.model.checkpoint import (
    CheckpointConfig,
    load_encoder,
    new_predictor,
    save_checkpoint,
)
from salt_distill.common.model.export import export
from salt_distill.common.model.vit import Encoder

VIEW = ViewConfig(num_frames=4, frame_step=1, crop_size=32)
PREDICTOR = PredictorConfig(width=48, depth=2, num_heads=2, mlp_width=96)  # head width 24, as in Table 4


def encoder_config(head_width: int = 64, **changes) -> EncoderConfig:
    """Two heads of a real width; the MLP of ViT-g and ViT-G is no whole multiple of the width."""
    width = 2 * head_width
    mlp_width = {88: width * 48 // 11, 104: width * 64 // 13}.get(head_width, 4 * width)
    return EncoderConfig.model_validate(
        {"width": width, "depth": 2, "num_heads": 2, "mlp_width": mlp_width, **changes}
    )


def save_ours(
    directory: Path,
    encoder: EncoderConfig,
    *,
    objective: str = "salt",
    out_width: int | None = None,
    **changes,
) -> Path:
    """A checkpoint in which no tensor is zero or one; its predictor fits transformers unless told
    otherwise."""
    values = {
        "objective": objective,
        "step": 7,
        "view": VIEW,
        "mask": MaskConfig(),
        "predictor": PREDICTOR,
        **changes,
    }
    config = CheckpointConfig(encoder=encoder, predictor_out_width=out_width or encoder.width, **values)
    models = Encoder(encoder), new_predictor(config)
    generator = torch.Generator().manual_seed(0)
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1, generator=generator)
    save_checkpoint(
        directory,
        config,
        {name: model.state_dict() for name, model in zip(("model", "predictor"), models, strict=True)},
        {},
    )
    return directory


def exported(ckpt: Path, out: Path, form: str, **clip: int) -> Path:
    """The checkpoint in another format."""
    export(
        ExportConfig.model_validate({"ckpt": str(ckpt), "format": form, "out": str(out), **clip}),
        rich.console.Console(quiet=True),
    )
    return out


def random_clip(num_frames: int, height: int, width: int | None = None) -> torch.Tensor:
    """Two normalised clips."""
    return torch.randn(2, 3, num_frames, height, width or height, generator=torch.Generator().manual_seed(1))


def theirs(model, clip):
    """Tokens by transformers, whose clips are [b, t, c, h, w]."""
    with torch.no_grad():
        return model(clip.transpose(1, 2), skip_predictor=True).last_hidden_state


def tokens(path, clip):
    with torch.no_grad():
        return load_encoder(path)(clip)
