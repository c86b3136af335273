"""Checkpoints of others are read, exactly or not at all; transformers is the oracle."""

import json
import re

import numpy as np
import pytest
import torch
from foreign_tools import VIEW, encoder_config, exported, random_clip, save_ours, theirs, tokens
from safetensors.torch import load_file, save_file
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model

from salt_distill.common.config import FrozenConfig, TeacherComputeConfig
from salt_distill.common.model.checkpoint import load_encoder, open_encoder
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.layouts import shapes_of, vjepa2_encoder
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.pt_files import NUM_HEADS, Family
from salt_distill.common.model.teacher import Teacher, fingerprint
from salt_distill.common.model.vit import Encoder

SMALL_HF = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "crop_size": 32,
    "frames_per_clip": 4,
    "pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["whole", "sharded", "classifier"])
def test_directories_of_transformers_are_read(kind, tmp_path):
    torch.manual_seed(0)
    config = VJEPA2Config(**SMALL_HF, num_pooler_layers=1, mlp_ratio=3.0)
    model = (VJEPA2ForVideoClassification if kind == "classifier" else VJEPA2Model)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    model.save_pretrained(tmp_path, max_shard_size="60KB" if kind == "sharded" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "sharded")
    clip = random_clip(4, 32)
    expected = theirs(model.vjepa2 if kind == "classifier" else model, clip)
    assert (tokens(tmp_path, clip) - expected).abs().max() < 1e-5
    found = open_encoder(FrozenConfig(ckpt=str(tmp_path)))
    assert (found.view.clip_shape, tuple(found.grid)) == ((4, 32, 32, 3), (2, 4, 4))
    assert (found.config.num_heads, found.config.mlp_width) == (4, 144)


def test_the_same_weights_are_the_same_teacher_in_every_format(ours, as_hf, as_pt):
    found = [open_encoder(FrozenConfig(ckpt=str(path))) for path in (ours, as_hf, as_pt)]
    modules = [encoder.load() for encoder in found]
    states = [module.state_dict() for module in modules]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())
    assert len({fingerprint(encoder, module) for encoder, module in zip(found, modules, strict=True)}) == 1
    assert [encoder.view.clip_shape for encoder in found] == [VIEW.clip_shape] * 3
    assert (
        found[2].view == VIEW
    )  # our own file keeps the whole view, config.json of transformers only its clip
    compute = TeacherComputeConfig(batch_size=2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *VIEW.clip_shape), dtype=np.uint8)
    teachers = [Teacher(encoder, compute, torch.device("cpu")) for encoder in found]
    targets = [teacher.forward(pixels) for teacher in teachers]
    assert torch.equal(targets[0], targets[1])
    assert torch.equal(targets[0], targets[2])


def test_another_normalisation_is_another_teacher_and_survives(ours, as_hf, tmp_path):
    mean = (0.5, 0.4, 0.3)
    ckpt = save_ours(tmp_path / "ours", encoder_config(), mean=mean)
    paths = [ckpt, exported(ckpt, tmp_path / "hf", "hf"), exported(ckpt, tmp_path / "x.pt", "vjepa2")]
    found = [open_encoder(FrozenConfig(ckpt=str(path))) for path in paths]
    assert [encoder.mean for encoder in found] == [mean] * 3
    plain = open_encoder(FrozenConfig(ckpt=str(ours)))
    assert torch.equal(*(encoder.load().state_dict()["norm.weight"] for encoder in (found[0], plain)))
    assert fingerprint(found[0], found[0].load()) != fingerprint(plain, plain.load())


def test_fingerprint_stays_what_it_was():
    """Caches and runs are named by it. Recorded before there were foreign encoders."""
    config = encoder_config(12, depth=1, mlp_width=48, patch_size=8)
    module = Encoder(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((torch.arange(parameter.numel()) / parameter.numel()).view_as(parameter))
    found = fingerprint(FrozenEncoder(name="", config=config, view=VIEW, load=lambda: module), module)
    assert found == "b20b52304957eef69d0f71a967e84597c60304c4cfa2938f689dc93509507907"


def released(path, *, prefix="module.backbone.", **more):
    """A file as V-JEPA 2 releases them, of its smallest size: no configuration, a table of positions that
    nothing reads, an optimizer."""
    config = encoder_config(32, width=192, depth=12, num_heads=3, mlp_width=768)
    generator = torch.Generator().manual_seed(0)
    encoder = {
        prefix + name: 0.1 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes_of(vjepa2_encoder(config)).items()
    }
    average = {name: tensor + 0.01 for name, tensor in encoder.items()}
    for tensors in (encoder, average):
        tensors[prefix + "pos_embed"] = torch.zeros(1, 8, 192)
    checkpoint = {
        "encoder": encoder,
        "target_encoder": average,
        "opt": {"state": {0: {"step": torch.ones(())}}},
        "epoch": 3,
        "loss": 0.5,
    }
    torch.save(checkpoint | more, path)
    return path, checkpoint


def test_a_file_without_configuration_is_recognised_by_its_sizes(tmp_path):
    path, checkpoint = released(tmp_path / "vitt.pt")
    found = open_encoder(FrozenConfig(ckpt=str(path)))
    assert found.config == encoder_config(32, width=192, depth=12, num_heads=3, mlp_width=768)
    assert found.view.clip_shape == (16, 224, 224, 3)
    state = found.load().state_dict()  # the moving average, as in the evaluations
    assert torch.equal(
        state["blocks.11.attn.w_qkv.weight"],
        checkpoint["target_encoder"]["module.backbone.blocks.11.attn.qkv.weight"],
    )
    assert state.keys() == Encoder(found.config).state_dict().keys()
    torch.save(
        {"encoder": {f"backbone.{name[16:]}": tensor for name, tensor in checkpoint["encoder"].items()}}, path
    )
    state = load_encoder(path).state_dict()
    assert torch.equal(state["norm.bias"], checkpoint["encoder"]["module.backbone.norm.bias"])


def test_a_file_of_any_size_can_say_its_heads(tmp_path):
    path, checkpoint = released(tmp_path / "vitt.pt")
    torch.save(
        checkpoint | {"salt": {"encoder": {"width": 192, "depth": 12, "num_heads": 12, "mlp_width": 768}}},
        path,
    )
    found = open_encoder(FrozenConfig(ckpt=str(path)))
    assert (found.config.num_heads, found.view.clip_shape) == (12, (16, 224, 224, 3))
    state = found.load().state_dict()
    assert torch.equal(state["norm.bias"], checkpoint["target_encoder"]["module.backbone.norm.bias"])


def test_heads_of_the_released_sizes():
    assert {size: size[0] // heads for size, heads in NUM_HEADS[Family.VJEPA2].items()} == {
        (192, 12): 64, (384, 12): 64, (768, 12): 64, (1024, 24): 64, (1280, 32): 80, (1408, 40): 64,
    }  # fmt: skip


def damage_hf(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.__setitem__(name, torch.zeros(*shape))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop("encoder.layer.1.attention.key.bias"), "encoder.layer.1.attention.key.bias is missing"),
        (put("encoder.layer.2.norm1.bias", 128), "encoder.layer.2.norm1.bias is not expected"),
        (
            put("encoder.layer.0.mlp.fc1.weight", 500, 128),
            r"encoder.layer.0.mlp.fc1.weight: got \(500, 128\), expected \(512, 128\)",
        ),
        (put("decoder.weight", 3), "decoder.weight is not expected"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(ours, tmp_path, change, sentence):
    directory = exported(ours, tmp_path / "hf", "hf")
    damage_hf(directory, change)
    with pytest.raises(ValueError, match=f"does not fit its config.json: {sentence}"):
        load_encoder(directory)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("num_hidden_layers", 10_000_000, "num_hidden_layers: got 10000000, expected at most 1000"),
        ("hidden_size", 10**9, "hidden_size: got 1000000000, expected at most 16384"),
        ("mlp_ratio", 1e12, "mlp_ratio: got 1000000000000.*, expected at most 16"),
        ("num_hidden_layers", 3, "encoder.layer.2.norm1.weight is missing"),
        ("num_hidden_layers", 1, "encoder.layer.1.*is not expected"),
        ("hidden_size", 64, r"got \(128, 3, 2, 16, 16\), expected \(64, 3, 2, 16, 16\)"),
        ("model_type", "dinov2", "model_type: got 'dinov2', expected vjepa2"),
        ("hidden_act", "silu", "hidden_act: got 'silu', expected gelu"),
        ("qkv_bias", False, "qkv_bias.*got false, expected true"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(ours, tmp_path, key, value, sentence):
    directory = exported(ours, tmp_path / "hf", "hf")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=sentence):
        load_encoder(directory)


@pytest.mark.parametrize(
    "content",
    ["[" * 200_000, "[1]", '{"model_type": 1}', '{"model_type": "vjepa2", "salt_view": ' + "[" * 200_000],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_damaged_or_nested_without_end_is_named(ours, tmp_path, name, content):
    directory = exported(ours, tmp_path / "hf", "hf")
    (directory / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        load_encoder(directory)


def test_a_missing_file_of_weights_is_named(ours, tmp_path):
    directory = exported(ours, tmp_path / "hf", "hf")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"got no model.safetensors, expected the model's weights as safetensors"
    ):
        load_encoder(directory)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"got no model-1\.safetensors"):
        load_encoder(directory)


def without(name):
    return lambda state: state.pop("module.backbone." + name)


def with_zeros(name, *shape):
    return lambda state: state.__setitem__("module.backbone." + name, torch.zeros(*shape))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("blocks.5.attn.proj.bias"), "blocks.5.attn.proj.bias is missing"),
        (with_zeros("blocks.0.mlp.fc3.bias", 192), "blocks.0.mlp.fc3.bias is not expected"),
        (with_zeros("blocks.3.norm1.weight", 191), r"blocks.3.norm1.weight: got \(191,\), expected \(192,\)"),
        (
            with_zeros("blocks.12.norm1.weight", 192),
            r"got 13 blocks of width 192, and no tensor tells the attention heads.*192 x 12: 3",
        ),
        (
            with_zeros("patch_embed.proj.weight", 192, 3, 16, 16),
            r"patch_embed.proj.weight \(192, 3, 16, 16\).*expected a video ViT's",
        ),
        (without("patch_embed.proj.weight"), "patch_embed.proj.weight None"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, sentence):
    path, checkpoint = released(tmp_path / "vitt.pt")
    change(checkpoint["target_encoder"])
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=sentence):
        load_encoder(path)


def test_our_own_file_does_not_fit_another_depth(as_pt, tmp_path):
    checkpoint = torch.load(as_pt, weights_only=True)
    checkpoint["salt"]["encoder"]["depth"] = 3
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"blocks.2.norm1.weight is missing"):
        load_encoder(tmp_path / "x.pt")
    checkpoint["salt"]["encoder"]["dept"] = 2
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt, key 'salt': encoder.dept: unknown key"):
        load_encoder(tmp_path / "x.pt")


def test_what_is_no_encoder_is_refused(tmp_path):
    torch.save({"classifiers": [{}], "epoch": 20}, tmp_path / "probe.pt")
    with pytest.raises(
        ValueError,
        match=r"got keys classifiers, epoch, expected an encoder's tensors.*a probe's file holds no encoder",
    ):
        load_encoder(tmp_path / "probe.pt")
    torch.save({"encoder": re.compile("x")}, tmp_path / "code.pt")  # a pickled call, which is never made
    with pytest.raises(ValueError, match="got no file of tensors and plain values"):
        load_encoder(tmp_path / "code.pt")
    noise = np.random.default_rng(0).bytes(5000)
    part = (tmp_path / "probe.pt").read_bytes()[:-100]
    for content in (b"not a checkpoint", noise, part, b""):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"other\.pt: got a file that torch\.save did not write, or only a"
        ):
            load_encoder(tmp_path / "other.pt")
    torch.save({"encoder": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pt: got a file in the format of torch before 1\.6"):
        load_encoder(tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"got nowhere, expected a run or checkpoint.*hf download"):
        load_encoder("nowhere")


def test_clips_of_another_size_move_no_weight(ours):
    """A teacher of 4x32x32 for 8x64x64: positions come from the true grid."""
    plain, larger = (
        open_encoder(FrozenConfig(ckpt=str(ours), **clip))
        for clip in ({}, {"num_frames": 8, "crop_size": 64})
    )
    teachers = [
        Teacher(encoder, TeacherComputeConfig(batch_size=1), torch.device("cpu"))
        for encoder in (plain, larger)
    ]
    assert [teacher.spec.clip_shape for teacher in teachers] == [(4, 32, 32, 3), (8, 64, 64, 3)]
    assert (teachers[1].spec.grid, teachers[1].spec.num_tokens) == ((4, 4, 4), 64)
    assert teachers[0].spec.fingerprint == teachers[1].spec.fingerprint
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 64, 64, 3), dtype=np.uint8)
    expected = tokens(ours, normalise(torch.from_numpy(pixels)))
    expected = torch.nn.functional.layer_norm(expected, (128,), eps=1e-5)
    assert torch.equal(teachers[1].forward(pixels), expected)
    with pytest.raises(ValueError, match="got a token grid of 2 frames by 8 pixels, expected 2 by 16"):
        open_encoder(FrozenConfig(ckpt=str(ours), patch_size=8))
    with pytest.raises(
        ValueError, match="got clips of 4 frames of 24 pixels, expected multiples of 2 frames and 16 pixels"
    ):
        open_encoder(FrozenConfig(ckpt=str(ours), crop_size=24))
