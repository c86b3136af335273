"""`salt-eval export`: our checkpoints as Hugging Face directories and as V-JEPA 2 files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from salt_distill.common.config import ExportConfig, FrozenConfig, ViewConfig
from salt_distill.common.console import console
from salt_distill.common.model.checkpoint import (
    CheckpointConfig,
    disk_errors,
    load_predictor,
    open_encoder,
    read_config,
)
from salt_distill.common.model.layouts import (
    hf_encoder,
    hf_predictor,
    to_theirs,
    vjepa2_encoder,
    vjepa2_predictor,
)
from salt_distill.common.model.model_card import model_card
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.pt_files import PT_CONFIG, PtConfig
from salt_distill.common.whole import whole_file, whole_folder

VJEPA2_PREFIX = "module.backbone."
"""Before every name in a file of V-JEPA 2's: its distributed wrapper and its multi-sequence wrapper."""


def export(
    choice: ExportConfig, console: Console = console, add_to: Callable[[Path], None] = lambda _: None
) -> None:
    """Writes a checkpoint in another's format; it appears whole or not at all. Raises ValueError where the
    format has no place for it.

    ``add_to``: writes what else a Hugging Face directory gets.
    """
    out = Path(choice.out)
    if out.exists():
        raise ValueError(f"got --out {out}, which exists: give another name")
    config = read_config(choice.ckpt)
    encoder = open_encoder(
        FrozenConfig(ckpt=choice.ckpt, num_frames=choice.num_frames, crop_size=choice.crop_size)
    )
    config = config.model_copy(update={"view": encoder.view})
    if config.encoder.rope != "vjepa2_tiled":
        raise ValueError(
            f"{choice.ckpt}: got rope={config.encoder.rope}, expected vjepa2_tiled: neither transformers nor"
            " V-JEPA 2 rotates positions the other way"
        )
    if choice.format == "hf":
        require_square(config.view, choice.ckpt)
    obstacle = _obstacle(config)
    teacher = _head(config)
    predictor = load_predictor(choice.ckpt, teacher) if obstacle is None else None
    if choice.format == "hf":
        with whole_folder(out) as partial, disk_errors(out):
            _write_hf(partial, config, encoder.load(), predictor)
            (partial / "README.md").write_text(model_card(config, name=encoder.name, obstacle=obstacle))
            add_to(partial)
    else:
        with whole_file(out) as partial, disk_errors(out):
            _write_vjepa2(partial, config, encoder.load(), predictor)
    held = "encoder and predictor" if obstacle is None else f"the encoder alone: {obstacle}"
    if obstacle is None and len(config.teacher_fingerprint) > 1:
        held += f", which predicts teacher {(teacher or '')[:12]} alone"
    console.print(f"{out}: {held}", highlight=False, markup=False, soft_wrap=True)


def require_square(view: ViewConfig, ckpt: str) -> None:
    """Raises ValueError for clips whose positions a VJEPA2 directory has no place for."""
    if view.height != view.width:
        raise ValueError(
            f"{ckpt}: got clips of {view.size_text} pixels, expected square ones: transformers takes rows and"
            f" columns from one crop_size; give --crop-size {view.height}, or --format vjepa2"
        )


def _obstacle(config: CheckpointConfig) -> str | None:
    """Why the predictor stays here, if it does: both formats have one that predicts latents as wide as the
    encoder's."""
    if config.objective == "vpixel":
        return "its predictor predicts pixels"
    if config.view.height != config.view.width:
        return "V-JEPA 2's predictor takes its positions from the grid of a square clip"
    if config.encoder.width not in config.predictor_out_width:
        return (
            "its predictor predicts latents of"
            f" {', '.join(map(str, config.predictor_out_width))} channels, the encoder's have"
            f" {config.encoder.width}"
        )
    return None


def _head(config: CheckpointConfig) -> str | None:
    """The first teacher as wide as the encoder: of several, the one whose latents the predictor is exported
    with."""
    widths = {teacher: rows.stop - rows.start for teacher, rows in config.head_of.items()}
    return next((teacher for teacher, width in widths.items() if width == config.encoder.width), None)


def _write_hf(out: Path, config: CheckpointConfig, encoder: nn.Module, predictor: Predictor | None) -> None:
    tensors = to_theirs(encoder.state_dict(), hf_encoder(config.encoder))
    if predictor is not None:
        tensors |= to_theirs(predictor.state_dict(), hf_predictor(predictor))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    crop_size = config.view.height
    processor = {
        "video_processor_type": "VJEPA2VideoProcessor",
        "size": {"shortest_edge": int(crop_size * 256 / 224)},
        "crop_size": {"height": crop_size, "width": crop_size},
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
        "rescale_factor": 1 / 255, "image_mean": config.mean, "image_std": config.std,
    }  # fmt: skip
    for name, values in (
        ("config.json", _hf_config(config, predictor is not None)),
        ("video_preprocessor_config.json", processor),
    ):
        (out / name).write_text(json.dumps(values, indent=2) + "\n")


def _hf_config(config: CheckpointConfig, with_predictor: bool) -> dict[str, Any]:
    encoder, predictor = config.encoder, config.predictor
    return {
        "architectures": ["VJEPA2Model"],
        "model_type": "vjepa2",
        "patch_size": encoder.patch_size,
        "crop_size": config.view.height,
        # The format has no place for the frame step and the like; transformers keeps what it does not know.
        "salt_view": config.view.model_dump(mode="json"),
        "frames_per_clip": config.view.num_frames,
        "tubelet_size": encoder.tubelet_size,
        "hidden_size": encoder.width,
        "in_chans": 3,
        "num_attention_heads": encoder.num_heads,
        "num_hidden_layers": encoder.depth,
        "mlp_ratio": _ratio(encoder.mlp_width, encoder.width),
        "layer_norm_eps": encoder.norm_eps,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "pred_hidden_size": predictor.width,
        "pred_num_attention_heads": predictor.num_heads,
        # A VJEPA2Model has a predictor in any case. Without its weights it has no blocks, and transformers
        # says which tensors it made up.
        "pred_num_hidden_layers": predictor.depth if with_predictor else 0,
        "pred_num_mask_tokens": len(config.mask.sets),
        "pred_mlp_ratio": _ratio(predictor.mlp_width, predictor.width),
    }


def _ratio(hidden_width: int, width: int) -> float:
    """What times ``width``, cut to a whole number as transformers cuts it, is ``hidden_width``."""
    ratio = hidden_width / width
    return ratio if int(width * ratio) == hidden_width else math.nextafter(ratio, math.inf)


def _write_vjepa2(
    out: Path, config: CheckpointConfig, encoder: nn.Module, predictor: Predictor | None
) -> None:
    """A student has no moving average: its weights stand under `encoder` and under `target_encoder`, which
    different loaders read."""
    tensors = _prefixed(to_theirs(encoder.state_dict(), vjepa2_encoder(config.encoder)))
    about = PtConfig(
        encoder=config.encoder,
        predictor=None if predictor is None else config.predictor,
        view=config.view,
        mean=config.mean,
        std=config.std,
    )
    checkpoint: dict[str, Any] = {
        "encoder": tensors,
        "target_encoder": tensors,
        "epoch": 0,
        PT_CONFIG: about.model_dump(mode="json"),
    }
    if predictor is not None:
        checkpoint["predictor"] = _prefixed(to_theirs(predictor.state_dict(), vjepa2_predictor(predictor)))
    torch.save(checkpoint, out)


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {VJEPA2_PREFIX + name: tensor for name, tensor in tensors.items()}
