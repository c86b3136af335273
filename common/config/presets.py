"""Sizes and masking strategies by name: arXiv:2509.24317, Tables 3 and 4, section 5.2; the sizes below vit-b
are ours, for CPUs and small GPUs."""

import math
from collections.abc import Mapping
from typing import Any

from salt_distill.common.config.base import Config, ConfigValues
from salt_distill.common.config.layers import choice, merge
from salt_distill.common.config.model import EncoderConfig, MaskConfig

_PAPER_STEPS = {"TeacherRun": 80_000, "StudentRun": 160_000, "VJepaRun": 240_000}


def _vit(width: int, depth: int, num_heads: int, mlp_width: int) -> ConfigValues:
    return {"encoder": {"width": width, "depth": depth, "num_heads": num_heads, "mlp_width": mlp_width}}


PRESETS: dict[str, ConfigValues] = {
    "vit-b": _vit(768, 12, 12, 3072),
    "vit-l": _vit(1024, 24, 16, 4096),
    "vit-h": _vit(1280, 32, 16, 5120),
    "vit-g": _vit(1408, 40, 16, 6144),
    # Weights, gradient and AdamW's state of 1.8e9 parameters are 29 GB.
    "vit-G": _vit(1664, 48, 16, 8192) | {"compute": {"sharding": "fsdp"}},
    # ViT-S and ViT-Ti. The paper's predictor would be as large as these encoders and see more tokens, so they
    # have one that is to them what it is to ViT-B: half the width, 12 deep, heads of 24. The weights' spread
    # is V-JEPA 2's at ViT-L, kept for narrower maps: 0.02 sqrt(1024 / width).
    "small": _vit(384, 12, 6, 1536)
    | {"predictor": {"width": 192, "depth": 12, "num_heads": 8, "mlp_width": 768}, "init_std": 0.033},
    "tiny": _vit(192, 12, 3, 768)
    | {"predictor": {"width": 96, "depth": 12, "num_heads": 4, "mlp_width": 384}, "init_std": 0.046},
    "nano": {
        "encoder": {"width": 96, "depth": 4, "num_heads": 3, "mlp_width": 384, "patch_size": 8},
        # One block: what a weak predictor can't work out, the encoder has to hold. With two, the encoder
        # learns motion in twice the steps.
        "predictor": {"width": 48, "depth": 1, "num_heads": 2, "mlp_width": 192},
        "init_std": 0.07,
        "view": {"num_frames": 8, "frame_step": 2, "crop_size": 32, "scale": (0.9, 1.0), "flip": False},
        # A run this short learns until its end: with a cosine to zero it would stop half-way. At three times
        # this rate it learns less of appearance (docs/appearance.md).
        "optim": {
            "lr": 1e-3,
            "start_lr": 1e-4,
            "final_lr": 1e-3,
            "warmup_steps": 30,
            "clip_grad": 1.0,
            "final_weight_decay": 0.04,
        },
        "loader": {"frame_cache_bytes": 1_000_000_000, "decode_processes": 0},
        "batch_size": 24,
        "steps": 1500,
    },
}

_BLOCKS = [mask_set.model_dump() for mask_set in MaskConfig().sets]
MASKS: dict[str, list[ConfigValues]] = {
    "multi-block": _BLOCKS,
    # V-JEPA's causal multi-block [12]: the last 4 of 16 frames are always hidden. Its [6] is
    # max_temporal_keep 0.375.
    "causal-multi-block": [blocks | {"max_temporal_keep": 0.75} for blocks in _BLOCKS],
    # VideoMAE's 0.9: of 196 places 176 are hidden, so 160 of 1568 tokens are visible (V-JEPA's own random
    # tube rounds to 152).
    "random-tube": [{"hidden_fraction": 0.9}],
    # Short and long range as tubes (section 5.2). The paper's fractions are unknown: its Table 15 is missing.
    # These leave visible what the two multi-block sets keep in mask groups of 24, .234 and .068 of the tokens
    # (46 and 13 of 196 places), so that only the masks' shape differs.
    "multi-random-tube": [{"hidden_fraction": 0.766}, {"hidden_fraction": 0.934}],
}


def is_papers_size(encoder: EncoderConfig) -> bool:
    """Whether an encoder is as large as the smallest of the paper, ViT-B."""
    smallest = PRESETS["vit-b"]["encoder"]
    return encoder.width >= smallest["width"] and encoder.depth >= smallest["depth"]


def name_of_size(encoder: EncoderConfig) -> str:
    """The preset whose encoder it is."""
    of_presets = {name: EncoderConfig(**values["encoder"]) for name, values in PRESETS.items()}
    return next((name for name, other in of_presets.items() if other == encoder), "sizes of no preset")


def preset_layer(
    config_class: type[Config], preset: str, presets: Mapping[str, ConfigValues] = PRESETS
) -> ConfigValues:
    """The values that a preset sets for a kind of run: of those that it has."""
    if preset not in list(presets):  # a file may hold what is no text
        raise ValueError(choice("preset", preset, presets))
    steps = {"steps": _PAPER_STEPS[config_class.__name__]} if config_class.__name__ in _PAPER_STEPS else {}
    return merge(
        steps, {key: value for key, value in presets[preset].items() if key in config_class.model_fields}
    )


def warmup_layer(
    config_class: type[Config], preset: Mapping[str, Any], typed: Mapping[str, Any]
) -> tuple[ConfigValues, str | None]:
    """The values that shorten a preset's warm-up where it is longer than the run, and a sentence about it;
    none, and None, where it fits, or where somebody typed it."""
    steps = str(typed.get("steps", preset.get("steps")))
    if "optim" not in config_class.model_fields or "warmup_steps" in _of_optim(typed):
        return {}, None
    default = config_class.model_fields["optim"].get_default().warmup_steps
    warmup_steps = preset.get("optim", {}).get("warmup_steps", default)
    if not steps.isdecimal() or warmup_steps < int(steps):
        return {}, None
    shortened = int(steps) // 10
    return (
        {"optim": {"warmup_steps": shortened}},
        f"optim.warmup_steps={shortened} in place of the preset's {warmup_steps}: the run has {steps} steps",
    )


def unscaled_rate(config: Config, preset: Mapping[str, Any], typed: Mapping[str, Any]) -> str | None:
    """A sentence about a preset's learning rate at another batch size than its own, which changes no rate;
    None where the rule gives the same, where somebody typed a rate, or where nothing learns."""
    values = dict(config)
    if "optim" not in values or "lr" in _of_optim(typed):
        return None
    batch_size, lr = values["batch_size"], f"{values['optim'].lr:.3g}"
    of_preset = preset.get("batch_size", type(config).model_fields["batch_size"].default)
    by_rule = f"{values['optim'].lr * math.sqrt(batch_size / of_preset):.3g}"
    if by_rule == lr:
        return None
    return (
        f"batch_size={batch_size} in place of the preset's {of_preset}: optim.lr stays {lr}; the square-root"
        f" rule for AdamW gives --set optim.lr={by_rule}"
    )


def _of_optim(typed: Mapping[str, Any]) -> Mapping[str, Any]:
    optim = typed.get("optim")
    return optim if isinstance(optim, dict) else {}  # what else it may be is told where it is validated


def mask_layer(mask: str) -> ConfigValues:
    """The values that a masking strategy sets."""
    if mask not in MASKS:
        raise ValueError(choice("mask", mask, MASKS))
    return {"mask": {"sets": MASKS[mask]}}
