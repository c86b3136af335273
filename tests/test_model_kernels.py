"""What a block reads and writes in bfloat16, as on a GPU: fewer and narrower passes, the same values."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from teacher_tools import BATCH_SIZE, ENCODER, VIEW, random_clips, save_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from salt_distill.common.config import (
    EncoderConfig,
    FlopsConfig,
    FrozenConfig,
    PredictorConfig,
    StudentRun,
    TeacherComputeConfig,
)
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.roofline import GPUS, seconds
from salt_distill.common.model.rope import rotate, rotate_queries_and_keys
from salt_distill.common.model.teacher import TARGET_NORM_EPS, Teacher
from salt_distill.common.model.vit import Encoder, Norm, RopeTables
from salt_distill.common.plan.counted import teacher_kernels
from salt_distill.student_trainer.step_count import count_step

CPU = torch.device("cpu")
GRID = TokenGrid(2, 4, 4)


@pytest.mark.parametrize("style", ["vjepa2_tiled", "interleaved"])
def test_turning_in_place_gives_the_bits_of_rotate_and_of_its_gradient(style):
    table = RopeTables(24, style)(GRID, torch.randint(GRID.num_tokens, (2, 5)), torch.device("cpu"))

    def results(turn, dtype):
        linear_map = torch.randn(2, 5, 3, 4, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        given = linear_map.requires_grad_()
        out = turn(rearrange(given.clone(), "b v three heads head -> three b heads v head"))
        torch.stack([(part.float() * (1 + part.detach().float())).sum() for part in out]).sum().backward()
        return [*out, given.grad]

    def apart(qkv):
        return *rotate(qkv[:2], table[:, None]), qkv[2]

    def in_place(qkv):
        out = rotate_queries_and_keys(qkv, table)
        assert out[1].untyped_storage().data_ptr() == qkv.data_ptr()
        return out

    for tensor, expected in zip(results(in_place, torch.float32), results(apart, torch.float32), strict=True):
        assert torch.equal(tensor, expected)
    rounded = zip(results(in_place, torch.bfloat16), results(apart, torch.bfloat16), strict=True)
    for tensor, expected in rounded:  # a fused multiplication and addition may round the other way
        torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=1e-3)


class Operations(TorchDispatchMode):
    """Names, types and shapes of the results of operations: those with at least so many values."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.results: list[tuple[str, torch.dtype, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.numel and not func.is_view:
            self.results.append((func.overloadpacket.__name__, out.dtype, out.shape))
        return out


def test_a_block_in_bfloat16_writes_no_token_in_float32_but_the_product_of_its_rotation():
    encoder = Encoder(EncoderConfig(width=24, depth=1, num_heads=2, mlp_width=48, patch_size=8))
    tokens = torch.randn(2, GRID.num_tokens, 24).bfloat16()
    table = encoder.rope(GRID, None, tokens.device)
    with Operations(tokens.numel()) as done, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = encoder.blocks[0](tokens, table)
    assert out.dtype == torch.bfloat16
    assert [name for name, dtype, _ in done.results if dtype == torch.float32] == ["mul"]


def test_a_norm_of_bfloat16_tokens_is_that_of_float32_rounded():
    norm, tokens = Norm(64), (3 + torch.randn(50, 64)).bfloat16()
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    torch.testing.assert_close(norm(tokens).float(), norm(tokens.float()), rtol=2**-6, atol=2**-7)
    assert norm(tokens).dtype == torch.bfloat16


def test_a_frozen_teacher_in_bfloat16_casts_its_weights_once_and_gives_the_bits_of_autocast(tmp_path):
    ckpt = save_teacher(tmp_path / "teacher")
    teacher = Teacher.load(ckpt, TeacherComputeConfig(batch_size=BATCH_SIZE, dtype="bfloat16"), CPU)
    clips = random_clips(BATCH_SIZE)
    with Operations(24 * 24) as done:
        targets = teacher.forward(clips)
    weights = {parameter.shape for parameter in Encoder(ENCODER).parameters() if parameter.ndim == 2}
    assert not weights & {shape for name, _, shape in done.results if name == "_to_copy"}
    frozen = open_encoder(FrozenConfig(ckpt=str(ckpt)))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        latents = frozen.load()(normalise(torch.from_numpy(clips)))
    assert torch.equal(targets, F.layer_norm(latents, latents.shape[-1:], eps=TARGET_NORM_EPS))


def test_visible_tokens_cut_from_bytes_are_those_of_the_normalised_clip():
    encoder = Encoder(ENCODER)
    pixels = torch.randint(0, 256, (3, *VIEW.clip_shape), dtype=torch.uint8)
    some = torch.tensor([[0, 3, 7], [1, 2, 3], [4, 5, 6]])
    assert torch.equal(encoder.visible(pixels, some), encoder(normalise(pixels), some))


def test_nothing_but_visible_tokens_is_normalised():
    encoder = Encoder(ENCODER)
    pixels = torch.randint(0, 256, (3, *VIEW.clip_shape), dtype=torch.uint8)
    with Operations(pixels.numel()) as done:
        encoder.visible(pixels, torch.tensor([[0, 3], [1, 2], [4, 5]]))
    assert done.results == []


def test_the_kernels_of_a_step_stay_as_few_as_they_are():
    """Against V-JEPA 2's own modules at ViT-L, 24 clips of 16 x 224 x 224, bfloat16, eager, on an H200's
    roofline: 73.27 and 162.66 ms (`python benchmarks/roofline.py --vjepa2 CLONE`, c2963a4). Counts are exact
    and a block's is the same wherever it stands, so one block more of each tells all of them."""

    def ms(depth, predictor_depth):
        encoder, predictor = EncoderConfig(depth=depth), PredictorConfig(depth=predictor_depth)
        compute = {"dtype": "bfloat16", "compile": False}
        run = StudentRun(
            data="", out="", teacher_url="http://127.0.0.1:1", workers=0, steps=160_000, batch_size=24,
            encoder=encoder, predictor=predictor, compute=compute,
        )  # fmt: skip
        teacher = teacher_kernels(FlopsConfig(encoder=encoder))
        return [1000 * seconds(part, GPUS["h200"]) for part in (teacher, count_step(run, 1024).group)]

    (dense, step), (dense_2, step_2), (_, predictor_2) = ms(1, 1), ms(2, 1), ms(1, 2)
    assert (dense + 23 * (dense_2 - dense)) / 73.27 < 0.76
    assert (step + 23 * (step_2 - step) + 11 * (predictor_2 - step)) / 162.66 < 0.56
