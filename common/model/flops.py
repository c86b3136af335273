"""Training compute by the 6ND rule (arXiv:2509.24317, Appendix F)."""

from common.config import MaskConfig

TRAIN_FLOPS = 6
"""FLOPs per parameter and token of a forward with its backward."""
FORWARD_FLOPS = 2
"""FLOPs per parameter and token of a forward."""


def step_flops(
    *,
    num_clips: int,
    num_tokens: int,
    encoder_parameters: int,
    predictor_parameters: int,
    teacher_parameters: int,
    mask: MaskConfig,
    context_fraction: float = 0.1,
) -> float:
    """FLOPs of one optimizer step.

    The encoder sees ``context_fraction`` of the tokens (0.1, the paper's figure for multi-block masks) once per mask set, the predictor is counted with every
    token once per mask set, a teacher with one dense forward.
    """
    tokens = num_clips * num_tokens
    num_sets = len(mask.sets)
    student = TRAIN_FLOPS * num_sets * tokens * (encoder_parameters * context_fraction + predictor_parameters)
    return student + FORWARD_FLOPS * tokens * teacher_parameters
