"""What `benchmarks.tokens` says of tokens, where it is known."""

import pytest
import torch
from eval_tools import make_dataset, make_run

from benchmarks.tokens import effective_rank, linear_r2, of_clips
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.vit import Encoder
from salt_distill.student_trainer.evaluation.candidates import open_candidates


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_mean_of_a_place_is_no_dimension():
    tokens = random(4000, 3, 2) @ random(2, 16)
    assert effective_rank(tokens) == pytest.approx(2, rel=0.1)
    assert effective_rank(tokens + 9 * torch.eye(16)[:3]) == pytest.approx(effective_rank(tokens), rel=1e-3)


def test_a_linear_map_finds_what_is_there_and_nothing_else():
    pixels = random(400, 6, 5)
    assert linear_r2(pixels @ random(5, 8) + 3, pixels) == pytest.approx(1, abs=1e-6)
    assert linear_r2(pixels[..., :3], pixels) == pytest.approx(3 / 5, abs=0.05)
    assert linear_r2(pixels.flip(0), pixels) == pytest.approx(0, abs=0.05)


def test_pixels_are_those_of_the_token(tmp_path):
    data = make_dataset(tmp_path / "toy", num_clips=90)
    (encoder,) = open_candidates([str(make_run(tmp_path / "run", data))], None, None, None)
    tokens, pixels = of_clips(encoder, str(data), 30)
    module = encoder.load()
    assert isinstance(module, Encoder)
    with torch.no_grad():
        again = module._encode(pixels, None, TokenGrid(2, 4, 4))
    assert tokens.shape == (30, 32, 24)
    torch.testing.assert_close(again, tokens)
