"""How much of its machines a run uses: model FLOPs utilisation."""

from dataclasses import dataclass
from typing import Self

from common.config import StudentRun, TrainConfig, VJepaRun
from common.model.flops import FORWARD_FLOPS, exact_flops, kept_tokens
from common.model.grid import token_grid
from common.model.teacher import TeacherSpec
from student_trainer.run_flops import teacher_architecture

MASK_GROUPS = 64
"""Mask groups whose tokens stand for the run's."""


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """What a clip costs the run's own workers, and what they could do at best."""

    clip_flops: float
    """Matrix products of a clip, forward and backward, and a teacher's forward where it runs in the workers; nothing that is computed twice."""
    peak_flops_per_s: float
    """Of all workers together, as ``common.model.compute.matrix_peak`` measures it."""

    @classmethod
    def of(cls, config: TrainConfig, teacher: TeacherSpec | None, *, out_width: int, peak_flops_per_s: float) -> Self:
        """Of a run. ``out_width``: channels of what is predicted."""
        grid = token_grid(config.view, config.encoder)
        in_workers = config.encoder if isinstance(config, VJepaRun) else None
        foreign_flops = 0.0
        if isinstance(config, StudentRun) and teacher is not None and config.teacher_ckpt is not None and config.teacher_url is None:
            in_workers = teacher_architecture(config.teacher_ckpt)
            if in_workers is None:
                foreign_flops = FORWARD_FLOPS * teacher.num_parameters * teacher.num_tokens
        kept = kept_tokens(config.mask, grid, seed=config.seed, batch_size=config.batch_size, num_groups=MASK_GROUPS)
        clip = exact_flops(
            kept,
            num_tokens=grid.num_tokens,
            encoder=config.encoder,
            predictor=config.predictor,
            out_width=out_width,
            teacher=in_workers,
        )
        return cls(clip_flops=clip.total + foreign_flops, peak_flops_per_s=peak_flops_per_s)

    def mfu(self, clips_per_s: float) -> float:
        """Share of the measured peak at this speed of the whole run."""
        return clips_per_s * self.clip_flops / self.peak_flops_per_s
