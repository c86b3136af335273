"""Learning rate, weight decay and V-JEPA's momentum as pure functions of the step (arXiv:2509.24317, Table
5)."""

import math

from salt_distill.common.config import EmaConfig, OptimConfig


def learning_rate(optim: OptimConfig, *, step: int, steps: int) -> float:
    """Linear warm-up, then ``optim.schedule`` until ``steps``; the first update is step 1."""
    if step < optim.warmup_steps:
        return optim.start_lr + step / optim.warmup_steps * (optim.lr - optim.start_lr)
    if optim.schedule == "cosine":
        return _cosine(optim.lr, optim.final_lr, (step - optim.warmup_steps) / (steps - optim.warmup_steps))
    decay_steps = optim.decay_fraction * steps
    if optim.schedule == "constant" or step <= steps - decay_steps:
        return optim.lr
    return optim.final_lr + (optim.lr - optim.final_lr) * (steps - step) / decay_steps


def weight_decay(optim: OptimConfig, *, step: int, steps: int) -> float:
    """A cosine from ``weight_decay`` to ``final_weight_decay`` over the whole run; ``weight_decay`` where the
    learning rate has another schedule."""
    if optim.schedule != "cosine":
        return optim.weight_decay
    return _cosine(optim.weight_decay, optim.final_weight_decay, step / steps)


def ema_momentum(ema: EmaConfig, *, step: int, steps: int) -> float:
    """Linear over the run; the first step has ``start`` (V-JEPA's code counts it as 0)."""
    return ema.start + (step - 1) / steps * (ema.end - ema.start)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
