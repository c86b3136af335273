"""VideoMAE's directories are read, exactly or not at all; transformers is the oracle."""

import json

import pytest
import torch
from foreign_tools import random_clip, tokens
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

from salt_distill.common.config import FrozenConfig, TeacherComputeConfig
from salt_distill.common.model.checkpoint import load_encoder, open_encoder
from salt_distill.common.model.layouts import to_theirs, vjepa2_encoder
from salt_distill.common.model.teacher import Teacher, fingerprint

SMALL = {
    "image_size": 32, "patch_size": 8, "num_frames": 4, "hidden_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
}  # fmt: skip


def save_random(kind, path, **changes):
    """A model in which no tensor is zero or one, saved; and its encoder."""
    model = kind(VideoMAEConfig(**SMALL | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    model.save_pretrained(path)
    return model if kind is VideoMAEModel else model.videomae


@pytest.mark.parametrize("mean_pooling", [False, True])
@pytest.mark.parametrize("kind", [VideoMAEModel, VideoMAEForPreTraining, VideoMAEForVideoClassification])
def test_directories_of_transformers_are_read(kind, mean_pooling, tmp_path):
    model = save_random(kind, tmp_path, use_mean_pooling=mean_pooling)
    clip = random_clip(4, 32)
    with torch.no_grad():
        expected = model(clip.transpose(1, 2)).last_hidden_state
    assert (tokens(tmp_path, clip) - expected).abs().max() < 1e-5
    found = open_encoder(FrozenConfig(ckpt=str(tmp_path)))
    assert (found.view.clip_shape, tuple(found.grid), found.config.num_heads) == (
        (4, 32, 32, 3),
        (2, 4, 4),
        4,
    )


def test_both_spellings_of_the_biases_are_read(tmp_path):
    save_random(VideoMAEModel, tmp_path)
    clip = random_clip(4, 32)
    before, path = tokens(tmp_path, clip), tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert any("q_bias" in name for name in tensors) != any("query.bias" in name for name in tensors)
    for theirs, other in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
        swapped = {theirs: other} if any(theirs in name for name in tensors) else {other: theirs}
        for old, new in swapped.items():
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    assert torch.equal(tokens(tmp_path, clip), before)


def test_a_clip_of_another_size_is_refused(tmp_path):
    save_random(VideoMAEModel, tmp_path)
    expected = "tokens for an encoder with absolute positions, expected 32 of a square clip"
    for clip, grid in ((random_clip(8, 32), "4x4x4"), (random_clip(4, 16, 64), "2x2x8")):
        with pytest.raises(ValueError, match=f"got clips of {grid} {expected}"):
            load_encoder(tmp_path)(clip)


def test_what_does_not_fit_is_named(tmp_path):
    save_random(VideoMAEModel, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"encoder.layer.0.lambda_1": torch.ones(48)}, path)
    with pytest.raises(ValueError, match=r"encoder.layer.0.lambda_1 is not expected"):
        load_encoder(tmp_path)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layer.1.intermediate.dense.bias" not in name},
        path,
    )
    with pytest.raises(ValueError, match=r"encoder.layer.1.intermediate.dense.bias is missing"):
        load_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act"):
        load_encoder(tmp_path)


def test_a_directory_is_the_teacher_of_its_file_if_their_epsilons_agree(tmp_path):
    """VideoMAE's code has 1e-6, transformers' default is 1e-12."""
    names = {}
    for eps in (1e-6, 1e-12):
        torch.manual_seed(0)
        size = {"image_size": 224, "patch_size": 56, "num_frames": 16}
        save_random(VideoMAEModel, tmp_path / "hf", use_mean_pooling=False, layer_norm_eps=eps, **size)
        directory = open_encoder(FrozenConfig(ckpt=str(tmp_path / "hf")))
        tensors = to_theirs(directory.load().state_dict(), vjepa2_encoder(directory.config))
        for name in [name for name in tensors if name.endswith("qkv.bias")]:
            query, _, value = tensors.pop(name).chunk(3)
            block = name.removesuffix("qkv.bias")
            tensors |= {f"{block}q_bias": query, f"{block}v_bias": value}
        sizes = {"width": 48, "depth": 2, "num_heads": 4, "mlp_width": 96, "patch_size": 56}
        torch.save({"model": tensors, "salt": {"encoder": sizes}}, tmp_path / "x.pth")
        found = (directory, open_encoder(FrozenConfig(ckpt=str(tmp_path / "x.pth"))))
        names[eps] = [fingerprint(encoder, encoder.load()) for encoder in found]
    assert names[1e-6][0] == names[1e-6][1] == names[1e-12][1] != names[1e-12][0]


def test_it_can_be_a_teacher(tmp_path):
    """The final norm and its positions are part of what it is called."""
    names = set()
    for changes in ({}, {"use_mean_pooling": False}, {"layer_norm_eps": 1e-6}):
        torch.manual_seed(0)
        save_random(VideoMAEModel, tmp_path / f"{len(names)}", **changes)
        names.add(
            Teacher.load(
                tmp_path / f"{len(names)}", TeacherComputeConfig(), torch.device("cpu")
            ).spec.fingerprint
        )
    assert len(names) == 3
