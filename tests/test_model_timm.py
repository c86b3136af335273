"""Image encoders of timm on clips; the oracle is timm itself, frame by frame."""

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import salt_distill
from salt_distill.common.config import FrozenConfig, TeacherComputeConfig
from salt_distill.common.model.checkpoint import load_encoder, open_encoder
from salt_distill.common.model.teacher import Teacher

VIT = "timm-random:vit_tiny_patch16_224"  # a class token
MODELS = {
    "vit_small_patch14_reg4_dinov2": (14, 5, 384),  # class token and registers, another patch
    "eva02_tiny_patch14_224": (14, 1, 192),  # rotary positions, no final norm
    "vit_base_patch16_siglip_224": (16, 0, 768),  # no class token, attention pool
}
"""Patch, prefix tokens, width."""


def opened(name, **clip):
    return open_encoder(FrozenConfig(ckpt=name, **clip))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_mean_of_the_frames_of_a_tubelet(name):
    patch, num_prefix_tokens, width = MODELS[name]
    module = load_encoder(f"timm-random:{name}")
    clip = torch.randn(2, 3, 4, 32, 48, generator=torch.Generator().manual_seed(0))  # a grid of 2 x 2 x 3
    with torch.no_grad():
        found = module(clip)
        for row in range(2):
            for step in range(2):
                frames = []
                for frame in (clip[row, :, 2 * step], clip[row, :, 2 * step + 1]):
                    resized = F.interpolate(
                        frame[None], (2 * patch, 3 * patch), mode="bilinear", align_corners=False
                    )
                    frames.append(module.model.forward_features(resized)[0, num_prefix_tokens:])
                assert found[row, 6 * step : 6 * step + 6].shape == (6, width)
                assert (found[row, 6 * step : 6 * step + 6] - (frames[0] + frames[1]) / 2).abs().max() < 1e-5
    assert found.shape == (2, 12, width)
    assert found.std() > 0.1
    assert not any(
        "attn_pool" in parameter or "head" in parameter for parameter, _ in module.named_parameters()
    )


def test_a_teacher_of_patch_14_sees_196_pixels_of_224():
    encoder = opened("timm-random:vit_small_patch14_reg4_dinov2")
    assert (encoder.view.clip_shape, tuple(encoder.grid)) == ((16, 224, 224, 3), (8, 14, 14))
    module, sizes = encoder.load(), []
    module.model.patch_embed.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        assert module(torch.zeros(1, 3, 2, 224, 224)).shape == (1, 196, 384)
    assert sizes == [(2, 3, 196, 196)]


def test_cubes_and_clips_are_the_students():
    encoder = opened(VIT, num_frames=6, crop_size=32, patch_size=8, tubelet_size=3)
    assert (encoder.view.clip_shape, tuple(encoder.grid)) == ((6, 32, 32, 3), (2, 4, 4))
    teacher = Teacher(encoder, TeacherComputeConfig(batch_size=2), torch.device("cpu"))
    assert (teacher.spec.name, teacher.spec.grid, teacher.spec.width) == (VIT, (2, 4, 4), 192)
    assert teacher.spec.compute["timm"] == timm.__version__
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 32, 32, 3), dtype=np.uint8)
    targets = teacher.forward(pixels)
    assert targets.shape == (2, 32, 192)
    assert (targets.mean(-1).abs().max(), (targets.std(-1, correction=0) - 1).abs().max()) < (1e-5, 1e-3)
    # its own mean and deviation, not ImageNet's
    assert (encoder.mean, encoder.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    public = salt_distill.load_encoder(VIT)
    assert (public.mean, public.std) == (encoder.mean, encoder.std)
    module = encoder.load()
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels).permute(0, 4, 1, 2, 3) / 127.5 - 1)
    assert (F.layer_norm(expected, (192,), eps=1e-5) - targets).abs().max() < 1e-4
    with pytest.raises(
        ValueError, match="got clips of 16 frames of 224 pixels, expected multiples of 3 frames and 8 pixels"
    ):
        opened(VIT, patch_size=8, tubelet_size=3)


def test_random_weights_are_the_same_each_time_and_leave_no_trace():
    before = torch.get_rng_state()
    teachers = []
    for _ in range(2):
        torch.rand(3)
        teachers.append(
            Teacher.load("timm-random:test_vit", TeacherComputeConfig(batch_size=1), torch.device("cpu"))
        )
    assert teachers[0].spec == teachers[1].spec
    torch.set_rng_state(before)
    expected = torch.rand(3)
    torch.set_rng_state(before)
    load_encoder("timm-random:test_vit")
    assert torch.equal(torch.rand(3), expected)


def test_cubes_are_part_of_the_identity():
    specs = []
    for patch_size in (16, 8):
        encoder = opened("timm-random:test_vit", crop_size=16, num_frames=2, patch_size=patch_size)
        specs.append(Teacher(encoder, TeacherComputeConfig(batch_size=1), torch.device("cpu")).spec)
    assert specs[0].fingerprint != specs[1].fingerprint


def test_weights_that_cannot_be_downloaded_are_never_random(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    encoder = opened("timm:test_vit.r160_in1k")  # what it is needs no weights
    with pytest.raises(
        ValueError,
        match=(
            r"timm:test_vit.r160_in1k: its weights cannot be had.*timm-random:test_vit.r160_in1k for random"
        ),
    ):
        encoder.load()


@pytest.mark.parametrize(
    ("ckpt", "sentence"),
    [
        ("timm-random:resnet18", "expected a ViT, whose tokens form a grid at any size.*ResNet"),
        ("timm-random:swin_tiny_patch4_window7_224", "a SwinTransformer, expected a ViT"),
        ("timm:vit_tinny", "got timm:vit_tinny, expected an architecture of timm"),
        ("timm:vit_tiny_patch16_224.no_such_tag", "no_such_tag"),
    ],
)
def test_what_is_no_grid_of_tokens_is_refused(ckpt, sentence):
    with pytest.raises(ValueError, match=sentence):
        opened(ckpt)


def test_an_architecture_without_released_weights_is_refused():
    with pytest.raises(ValueError, match=r"got timm:test_vit4: No pretrained weights"):
        opened("timm:test_vit4").load()
