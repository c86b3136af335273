"""How many dimensions the tokens of frozen encoders use, and how much of their own pixels a linear map finds
in them: a row for each encoder. `python -m benchmarks.tokens --help`."""

import argparse

import torch
from jaxtyping import Float
from torch import Tensor

from salt_distill.common.config import LoaderConfig
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.grid import cubes
from salt_distill.common.model.pixels import normalise
from salt_distill.student_trainer.evaluation.candidates import open_candidates
from salt_distill.student_trainer.evaluation.probe.features import first_clips
from salt_distill.student_trainer.evaluation.rank import rankme

TRAIN_SHARE = 3 / 4
"""Of the clips from which the linear map is learned; it is judged on the others."""


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=__doc__)
    parser.add_argument("--ckpt", action="append", required=True, help="encoder of ours; repeatable")
    parser.add_argument("--data", required=True, help="packed data set; clips of its split test are read")
    parser.add_argument("--clips", type=int, default=800, help="most of them (default: %(default)s)")
    arguments = parser.parse_args()
    print("| | effective rank of the tokens | R² of their own pixels |\n|---|---:|---:|")
    for encoder in open_candidates(arguments.ckpt, None, None, None, random_seed=0):
        tokens, pixels = of_clips(encoder, arguments.data, arguments.clips)
        rank, width = effective_rank(tokens), tokens.shape[-1]
        print(f"| {encoder.name} | {rank:.1f} of {width} | {linear_r2(tokens, pixels):.3f} |", flush=True)


def of_clips(
    encoder: FrozenEncoder, data: str, num_clips: int
) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b n p"]]:
    """Tokens of a data set's first test clips, and the normalised pixels of each token's own place."""
    _, clips = first_clips(data, "test", encoder.view, LoaderConfig(decode_processes=0), num_clips)
    shape = encoder.config
    module, tokens, pixels = encoder.load(), [], []
    for batch in torch.from_numpy(clips).split(100):
        video = normalise(batch, encoder.mean, encoder.std)
        with torch.no_grad():
            tokens.append(module(video))
        pixels.append(
            cubes(video, None, patch_size=shape.patch_size, tubelet_size=shape.tubelet_size).flatten(2)
        )
    return torch.cat(tokens), torch.cat(pixels)


def effective_rank(tokens: Float[Tensor, "b n e"]) -> float:
    """RankMe of single tokens, without the mean of all tokens of their place: at most the channels."""
    return rankme((tokens - tokens.mean(0)).flatten(0, 1))


def linear_r2(tokens: Float[Tensor, "b n e"], pixels: Float[Tensor, "b n p"]) -> float:
    """The share of the pixels' differences between clips that a linear map, the same at every place, finds in
    the tokens of clips that it was not learned from."""
    x, y = ((of - of.mean(0)).double() for of in (tokens, pixels))
    learned = int(TRAIN_SHARE * len(x))
    weights = torch.linalg.lstsq(x[:learned].flatten(0, 1), y[:learned].flatten(0, 1)).solution
    missed = y[learned:] - x[learned:] @ weights
    return float(1 - missed.square().sum() / y[learned:].square().sum())


if __name__ == "__main__":
    main()
