"""Oracles of training: schedules, pixel targets, and where a step's compute goes."""

import torch

from salt_distill.common.config import EmaConfig, EncoderConfig, OptimConfig
from salt_distill.common.model.flops import encoder_forward
from salt_distill.common.model.pixels import pixel_targets
from salt_distill.student_trainer.evaluation.fidelity.oracle import PAPER, VJEPA2, Oracle, near, printed
from salt_distill.student_trainer.evaluation.fidelity.paper_flops import count
from salt_distill.student_trainer.schedule import ema_momentum, learning_rate, weight_decay

TABLE_5 = f"{PAPER}, Table 5, by hand"
LEARNING_RATES = {
    (160_000, 1): 2.00043e-4,
    (160_000, 5_000): 4.125e-4,
    (160_000, 10_000): 6.25e-4,
    (160_000, 80_000): 3.45613e-4,
    (160_000, 160_000): 1e-6,
    (80_000, 40_000): 3.82427e-4,
    (40_000, 20_000): 4.69e-4,
}
"""At a step of a run of so many steps."""
WEIGHT_DECAYS = {10_000: 0.043459, 80_000: 0.22, 160_000: 0.4}
"""At a step of a run of 160,000."""
TEACHER_SHARES = {"vit-l": "49", "vit-h": "37", "vit-g": "29", "vit-G": "20"}
"""Percent of a student's step, by 6ND."""


def schedules() -> list[Oracle]:
    """Learning rate, in 1e-4, weight decay, and the baseline's momentum."""
    optim = OptimConfig()
    rates = [
        near(
            f"learning rate / 1e-4 at step {step:,} of {steps:,}",
            TABLE_5,
            1e4 * expected,
            lambda step=step, steps=steps: 1e4 * learning_rate(optim, step=step, steps=steps),
            within=5e-6,
            relative=True,
            digits=6,
        )
        for (steps, step), expected in LEARNING_RATES.items()
    ]
    decays = [
        near(
            f"weight decay at step {step:,} of 160,000",
            TABLE_5,
            expected,
            lambda step=step: weight_decay(optim, step=step, steps=160_000),
            within=1e-5,
            relative=True,
            digits=6,
        )
        for step, expected in WEIGHT_DECAYS.items()
    ]
    momentum = near(
        "momentum of V-JEPA 2's target, first and last step",
        VJEPA2,
        (0.99925, 0.99925),
        lambda: [ema_momentum(EmaConfig(), step=step, steps=240_000) for step in (1, 240_000)],
        within=1e-9,
        digits=5,
    )
    return [*rates, *decays, momentum]


def pixels() -> list[Oracle]:
    """What V-Pixel predicts."""
    return [
        near(
            "mean square of the pixel targets: 511/512",
            "VideoMAE's code",
            511 / 512,
            _mean_square,
            within=1e-4,
            digits=4,
        )
    ]


def compute() -> list[Oracle]:
    """The exact count, and the teacher's share."""
    oracles = [
        printed(
            "ViT-L, dense, 16 frames at 224: TFLOP a clip, attention included",
            "by hand",
            "1.19",
            lambda: encoder_forward(EncoderConfig(), 1568).total / 1e12,
        )
    ]
    for preset, share in TEACHER_SHARES.items():
        oracles.append(
            printed(
                f"ViT-L teacher's share of a step of {preset}, 6ND",
                "by hand",
                share,
                lambda preset=preset: _teacher_share(preset),
                unit="%",
            )
        )
    return oracles


def _mean_square() -> float:
    noise = torch.randint(
        0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    targets = pixel_targets(
        noise, torch.zeros(4, 1, dtype=torch.int64), patch_size=16, tubelet_size=2, norm="channel"
    )
    return float(targets.square().mean())


def _teacher_share(preset: str) -> float:
    run = count(preset, teacher="vit-l", steps=1)
    return 100 * 2 * run.teacher * run.d_teacher / run.flops
