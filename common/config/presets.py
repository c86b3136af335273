"""Sizes and schedules by name: arXiv:2509.24317, Tables 3 and 4; nano is ours, for CPUs."""

from typing import Any

from common.config.base import Config, merge

_PAPER_STEPS = {"TeacherRun": 80_000, "StudentRun": 160_000}


def _vit(width: int, depth: int, num_heads: int, mlp_width: int) -> dict[str, Any]:
    return {"encoder": {"width": width, "depth": depth, "num_heads": num_heads, "mlp_width": mlp_width}}


PRESETS: dict[str, dict[str, Any]] = {
    "vit-b": _vit(768, 12, 12, 3072),
    "vit-l": _vit(1024, 24, 16, 4096),
    "vit-h": _vit(1280, 32, 16, 5120),
    "vit-g": _vit(1408, 40, 16, 6144),
    "vit-G": _vit(1664, 48, 16, 8192),
    "nano": {
        "encoder": {"width": 96, "depth": 4, "num_heads": 3, "mlp_width": 384, "patch_size": 8},
        "predictor": {"width": 48, "depth": 2, "num_heads": 2, "mlp_width": 192},
        "init_std": 0.07,
        "view": {"num_frames": 8, "frame_step": 2, "crop_size": 32, "scale": (0.6, 1.0)},
        "optim": {"lr": 2e-3, "start_lr": 2e-4, "warmup_steps": 30, "clip_grad": 1.0, "final_weight_decay": 0.04},
        "loader": {"frame_cache_bytes": 1_000_000_000},
        "batch_size": 48,
        "steps": 600,
    },
}

def preset_layer(config_class: type[Config], preset: str) -> dict[str, Any]:
    """The values that a preset sets for a kind of run."""
    if preset not in PRESETS:
        raise ValueError(f"got preset {preset!r}, expected one of {', '.join(PRESETS)}")
    steps = {"steps": _PAPER_STEPS[config_class.__name__]} if config_class.__name__ in _PAPER_STEPS else {}
    return merge(steps, {key: value for key, value in PRESETS[preset].items() if key in config_class.model_fields})
