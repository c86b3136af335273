"""The compute of one training run: by the paper's 6ND, and every matrix product at the tokens that the masks
keep."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from salt_distill.common.config import EncoderConfig, FrozenConfig, PredictorConfig
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.flops import (
    Flops,
    KeptTokens,
    encoder_parameters,
    exact_flops,
    predictor_parameters,
    six_n_d,
)
from salt_distill.common.model.grid import TokenGrid

NAMES = {"vpixel": "V-Pixel", "salt": "SALT", "vjepa": "V-JEPA 2"}
"""Objectives, for people."""


@dataclass(frozen=True, kw_only=True)
class RunFlops:
    """A run and what it costs."""

    objective: str
    """vpixel, salt or vjepa."""
    encoder: EncoderConfig
    predictor: PredictorConfig
    out_width: int
    """Channels of what is predicted."""
    teacher: EncoderConfig | None
    """What runs forward over every clip, if anything."""
    steps: int
    batch_size: int
    grid: TokenGrid
    kept: Sequence[KeptTokens]
    """Mask groups that stand for all of the run's."""

    @property
    def num_clips(self) -> int:
        """Clips of the whole run."""
        return self.steps * self.batch_size

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Weights of encoder, predictor and teacher."""
        return {
            "encoder": encoder_parameters(self.encoder),
            "predictor": predictor_parameters(
                self.predictor,
                in_width=self.encoder.width,
                out_width=self.out_width,
                num_mask_tokens=len(self.shares),
            ),
            "teacher": 0 if self.teacher is None else encoder_parameters(self.teacher),
        }

    @cached_property
    def shares(self) -> list[tuple[float, float]]:
        """Context and target tokens of each mask set as shares of the grid: the mean over ``kept``."""
        tokens = self.grid.num_tokens * sum(group.num_clips for group in self.kept)

        def mean(counts: list[int]) -> float:
            return (
                sum(group.num_clips * count for group, count in zip(self.kept, counts, strict=True)) / tokens
            )

        return [
            (
                mean([group.visible[set_idx] for group in self.kept]),
                mean([group.hidden[set_idx] for group in self.kept]),
            )
            for set_idx in range(len(self.kept[0].visible))
        ]

    @property
    def tokens(self) -> dict[str, float]:
        """Tokens that each part sees of one clip, all mask sets together."""
        num_tokens = self.grid.num_tokens
        visible, hidden = (num_tokens * sum(shares) for shares in zip(*self.shares, strict=True))
        return {
            "encoder": visible,
            "predictor": visible + hidden,
            "teacher": float(num_tokens if self.teacher else 0),
        }

    @cached_property
    def six_n_d(self) -> Flops:
        """FLOPs of the whole run by the paper's rule."""
        parameters = {f"{part}_parameters": number for part, number in self.parameters.items()}
        return (
            six_n_d(num_tokens=self.grid.num_tokens, num_sets=len(self.shares), **parameters) * self.num_clips
        )

    @cached_property
    def exact(self) -> Flops:
        """FLOPs of the whole run's matrix products."""
        clip = exact_flops(
            self.kept,
            num_tokens=self.grid.num_tokens,
            encoder=self.encoder,
            predictor=self.predictor,
            out_width=self.out_width,
            teacher=self.teacher,
        )
        return clip * self.num_clips

    def to_json(self) -> dict[str, Any]:
        """Plain types; tokens are per clip, over all mask sets."""
        return {
            "objective": self.objective,
            "steps": self.steps,
            "num_clips": self.num_clips,
            "num_parameters": self.parameters,
            "tokens_of_grid": self.grid.num_tokens,
            "tokens_seen": self.tokens,
            "six_n_d": asdict(self.six_n_d) | {"total": self.six_n_d.total},
            "exact": asdict(self.exact) | {"total": self.exact.total},
        }


def teacher_architecture(ckpt: str) -> EncoderConfig | None:
    """Of a frozen teacher; None where it is no video ViT of ours, whose products could be counted. Reads no
    weights."""
    config = open_encoder(FrozenConfig(ckpt=ckpt)).config
    return config if isinstance(config, EncoderConfig) else None


def scientific(flops: float) -> str:
    """Four digits: 1.193e21."""
    mantissa, exponent = f"{flops:.3e}".split("e")
    return f"{mantissa}e{int(exponent)}"
