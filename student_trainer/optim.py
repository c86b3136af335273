"""AdamW with V-JEPA's parameter groups."""

import torch
from torch import nn

from salt_distill.common.config import OptimConfig
from salt_distill.student_trainer.schedule import learning_rate, weight_decay


def new_optimizer(modules: list[nn.Module], optim: OptimConfig) -> torch.optim.AdamW:
    """Per module a group with weight decay and one without: biases and norms are never decayed, mask tokens
    are (V-JEPA's code)."""
    groups = []
    for module in modules:
        decayed = [p for name, p in module.named_parameters() if not (name.endswith("bias") or p.ndim == 1)]
        not_decayed = [p for name, p in module.named_parameters() if name.endswith("bias") or p.ndim == 1]
        groups += [
            {"params": decayed, "decays": True},
            {"params": not_decayed, "decays": False, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_schedule(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, *, step: int, steps: int
) -> tuple[float, float]:
    """(learning rate, weight decay) of a step, now set in the optimizer."""
    lr, decay = learning_rate(optim, step=step, steps=steps), weight_decay(optim, step=step, steps=steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = decay
    return lr, decay
