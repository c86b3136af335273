"""How much of its machines a run uses: model FLOPs utilisation."""

from dataclasses import dataclass
from typing import Self

from salt_distill.common.config import TrainConfig, VJepaRun
from salt_distill.common.model.flops import exact_flops, kept_tokens
from salt_distill.common.model.grid import token_grid

MASK_GROUPS = 64
"""Mask groups whose tokens stand for the run's."""


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """What a clip costs the run's own workers, and what they could do at best."""

    clip_flops: float
    """Matrix products of a clip, forward and backward, and a teacher's forward where it runs in the workers;
    nothing that is computed twice."""
    peak_flops_per_s: float
    """Of all workers together, as ``salt_distill.common.model.compute.matrix_peak`` measures it."""

    @classmethod
    def of(cls, config: TrainConfig, *, out_width: int, target_flops: float, peak_flops_per_s: float) -> Self:
        """Of a run. ``out_width``: channels of what is predicted; ``target_flops``: of a clip's target, where
        a frozen teacher runs in the workers."""
        grid = token_grid(config.view, config.encoder)
        clip = exact_flops(
            kept_tokens(
                config.mask, grid, seed=config.seed, batch_size=config.batch_size, num_groups=MASK_GROUPS
            ),
            num_tokens=grid.num_tokens,
            encoder=config.encoder,
            predictor=config.predictor,
            out_width=out_width,
            teacher=config.encoder if isinstance(config, VJepaRun) else None,
        )
        return cls(clip_flops=clip.total + target_flops, peak_flops_per_s=peak_flops_per_s)

    def mfu(self, clips_per_s: float) -> float:
        """Share of the measured peak at this speed of the whole run."""
        return clips_per_s * self.clip_flops / self.peak_flops_per_s
