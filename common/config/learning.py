"""How a run learns: AdamW, its schedules, V-JEPA's momentum."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from salt_distill.common.config.base import Config
from salt_distill.common.config.marks import OnResume

Schedule = Literal["cosine", "constant", "wsd"]

Beta = Annotated[float, Field(ge=0, lt=1)]

_RATES = "the learning rate from here on; where it jumps, both rates are said"
_SCHEDULES = "learning rate and weight decay from here on; where one jumps, both values are said"


class OptimConfig(Config):
    """AdamW and its schedules (Table 5)."""

    lr: PositiveFloat = 6.25e-4
    """Peak learning rate for the global batch."""
    start_lr: PositiveFloat = 2e-4
    """Learning rate that the warm-up starts from."""
    final_lr: Annotated[PositiveFloat, OnResume(_RATES)] = 1e-6
    """Learning rate at the last step; not used by `constant`."""
    warmup_steps: NonNegativeInt = 10_000
    """Steps of linear warm-up."""
    schedule: Annotated[Schedule, OnResume(_SCHEDULES)] = "cosine"
    """Learning rate after the warm-up. `cosine`: falls to `final_lr` over the whole run (the paper).
    `constant`: stays at `lr`, for a run whose length is not known yet. `wsd`: stays at `lr`, and falls
    linearly to `final_lr` in the last `decay_fraction` of the run."""
    decay_fraction: Annotated[float, OnResume(_RATES)] = Field(default=0.1, gt=0, le=1)
    """For `wsd`: share of the run's steps, at its end, in which the learning rate falls."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at step 0."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """Weight decay at the last step of a `cosine`; the other schedules keep `weight_decay` throughout."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's beta1 and beta2."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    clip_grad: PositiveFloat = 0.02
    """Largest norm of the gradient."""
    clip: Literal["separate", "joint"] = "separate"
    """Clip the gradients of encoder and predictor `separate`ly (V-JEPA's code), or by their `joint` norm."""
    clip_after_warmup: bool = True
    """Clip no gradients during the warm-up (V-JEPA's code)."""


class EmaConfig(Config):
    """Momentum of V-JEPA's target encoder: target = momentum * target + (1 - momentum) * encoder after each
    step, linear in the step."""

    start: float = Field(default=0.99925, ge=0, le=1)
    """At the first step. V-JEPA 2: 0.99925 throughout; V-JEPA: from 0.998 to 1."""
    end: float = Field(default=0.99925, ge=0, le=1)
    """At the last step."""
