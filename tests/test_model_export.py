"""`salt-eval export`: transformers is the oracle for every number, V-JEPA 2's names are those of its
reference code."""

import pytest
import torch
from foreign_tools import encoder_config, exported, random_clip, save_ours, theirs, tokens
from safetensors.torch import load_file
from transformers import AutoVideoProcessor, VJEPA2Model

from salt_distill.common.config import FrozenConfig
from salt_distill.common.model.checkpoint import load_encoder, load_predictor, open_encoder
from salt_distill.common.model.export import _ratio
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.pixels import normalise


@pytest.mark.parametrize("head_width", [64, 80, 88, 104])
@pytest.mark.parametrize(("num_frames", "crop_size"), [(None, None), (64, 32), (4, 80)])
def test_transformers_gives_our_tokens(head_width, num_frames, crop_size, tmp_path):
    ckpt = save_ours(tmp_path / "ours", encoder_config(head_width))
    clip_of = {name: value for name, value in (("num_frames", num_frames), ("crop_size", crop_size)) if value}
    model, loading = VJEPA2Model.from_pretrained(
        exported(ckpt, tmp_path / "hf", "hf", **clip_of), output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert (
        open_encoder(FrozenConfig(ckpt=str(tmp_path / "hf"))).view
        == open_encoder(FrozenConfig(ckpt=str(ckpt), **clip_of)).view
    ), "it is probed on the same clips"
    assert (model.config.frames_per_clip, model.config.crop_size) == (num_frames or 4, crop_size or 32)
    clip = random_clip(num_frames or 4, crop_size or 32)
    expected = tokens(ckpt, clip)
    assert expected.std() > 0.5
    assert (theirs(model.eval(), clip) - expected).abs().max() < 1e-5


def test_transformers_is_right_only_at_the_crop_that_was_exported(ours, as_hf, tmp_path):
    clip = random_clip(4, 64)
    expected = tokens(ours, clip)
    wrong = theirs(VJEPA2Model.from_pretrained(as_hf).eval(), clip)
    right = theirs(
        VJEPA2Model.from_pretrained(exported(ours, tmp_path / "hf", "hf", crop_size=64)).eval(), clip
    )
    assert (wrong - expected).abs().max() > 0.1
    assert (right - expected).abs().max() < 1e-5


def test_wide_clips_go_where_the_format_has_a_place_for_them(tmp_path):
    """V-JEPA 2's encoder takes rows and columns from the clip, its predictor and transformers from one
    number."""
    view = {"num_frames": 4, "frame_step": 1, "crop_size": [32, 48]}
    wide = save_ours(tmp_path / "ours", encoder_config(), view=view)
    with pytest.raises(ValueError, match="got clips of 32x48 pixels, expected square ones"):
        exported(wide, tmp_path / "hf", "hf")
    file = exported(wide, tmp_path / "x.pt", "vjepa2")
    assert "predictor" not in torch.load(file, weights_only=True)
    assert open_encoder(FrozenConfig(ckpt=str(file))).grid == (2, 2, 3)
    assert torch.equal(tokens(file, random_clip(4, 32, 48)), tokens(wide, random_clip(4, 32, 48)))
    exported(wide, tmp_path / "hf", "hf", crop_size=32)


def test_every_mlp_width_survives_the_ratio():
    sizes = [(width, hidden) for width in range(8, 1700, 8) for hidden in range(8, 4 * width, 72)] + [
        (1408, 6144),
        (1664, 8192),
    ]
    assert (
        sum(int(width * (hidden / width)) != hidden for width, hidden in sizes) > 0
    )  # the plain quotient loses some
    assert [size for size in sizes if int(size[0] * _ratio(size[1], size[0])) != size[1]] == []


def test_transformers_predictor_gives_our_predictions(ours, as_hf):
    """Given tokens of an encoder that saw the context alone, which ``VJEPA2Model.forward`` never gives it."""
    model, predictor, encoder = (
        VJEPA2Model.from_pretrained(as_hf).eval(),
        load_predictor(ours),
        load_encoder(ours),
    )
    visible_idx, hidden_idx = torch.tensor([[0, 3, 6], [1, 2, 7]]), torch.tensor([[1, 2, 4, 7], [0, 3, 5, 6]])
    with torch.no_grad():
        visible = encoder(random_clip(4, 32), visible_idx)
        expected = predictor(
            visible, visible_idx, hidden_idx, grid=TokenGrid(2, 2, 2), mask_set=1
        )  # its mask_index is 1, always
        spread = torch.zeros(2, 8, 128).scatter(1, visible_idx[..., None].expand(-1, -1, 128), visible)
        found = model.predictor(spread, [visible_idx], [hidden_idx]).last_hidden_state
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": "vpixel", "out_width": 1536}, "predicts pixels"),
        ({"out_width": 40}, "latents of 40 channels"),
    ],
)
def test_a_predictor_that_does_not_fit_stays_here_and_transformers_says_so(changes, reason, tmp_path):
    ckpt = save_ours(tmp_path / "ours", encoder_config(), **changes)
    directory = exported(ckpt, tmp_path / "hf", "hf")
    model, loading = VJEPA2Model.from_pretrained(directory, output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert all(name.startswith("predictor.") for name in loading["missing_keys"])
    assert len(loading["missing_keys"]) == 7  # no blocks: embedding, mask tokens, norm, projection
    card = (directory / "README.md").read_text()
    assert reason in card
    assert "skip_predictor=True" in card
    clip = random_clip(4, 32)
    assert (theirs(model.eval(), clip) - tokens(ckpt, clip)).abs().max() < 1e-5
    checkpoint = torch.load(exported(ckpt, tmp_path / "x.pt", "vjepa2"), weights_only=True)
    assert "predictor" not in checkpoint
    assert checkpoint["salt"]["predictor"] is None


def test_the_video_processor_gives_our_normalisation(as_hf):
    processor = AutoVideoProcessor.from_pretrained(as_hf)
    assert type(processor).__name__ == "VJEPA2VideoProcessor"
    video = torch.randint(
        0, 256, (4, 3, 36, 36), dtype=torch.uint8
    )  # the crop times 256 / 224: nothing is resized
    found = processor([video], return_tensors="pt")["pixel_values_videos"]
    expected = normalise(video[None, :, :, 2:34, 2:34].permute(0, 1, 3, 4, 2)).transpose(1, 2)
    assert found.shape == (1, 4, 3, 32, 32)
    assert (found - expected).abs().max() < 1e-5


def test_names_and_shapes_of_a_vjepa2_file(ours, as_pt, as_hf):
    """Two loaders of V-JEPA 2: both drop ``module.`` and ``backbone.``, the hub reads one key, the
    evaluations the other."""
    checkpoint = torch.load(as_pt, weights_only=True)
    block = {
        "norm1": (128,), "norm2": (128,), "attn.qkv": (384, 128), "attn.proj": (128, 128), "mlp.fc1": (512,
        128), "mlp.fc2": (128, 512),
    }  # fmt: skip
    maps = {
        "patch_embed.proj": (128, 3, 2, 16, 16),
        "norm": (128,),
        **{f"blocks.{i}.{name}": block[name] for i in (0, 1) for name in block},
    }
    expected = {f"{name}.weight": shape for name, shape in maps.items()} | {
        f"{name}.bias": shape[:1] for name, shape in maps.items()
    }
    for key in ("encoder", "target_encoder"):
        cleaned = {
            name.replace("module.", "").replace("backbone.", ""): tensor
            for name, tensor in checkpoint[key].items()
        }
        assert {name: tuple(tensor.shape) for name, tensor in cleaned.items()} == expected
        assert all(name.startswith("module.backbone.") for name in checkpoint[key])
    block = {
        "norm1": (48,), "norm2": (48,), "attn.qkv": (144, 48), "attn.proj": (48, 48), "mlp.fc1": (96, 48),
        "mlp.fc2": (48, 96),
    }  # fmt: skip
    maps = {"predictor_embed": (48, 128), "predictor_norm": (48,), "predictor_proj": (128, 48)}
    maps |= {f"predictor_blocks.{i}.{name}": block[name] for i in (0, 1) for name in block}
    expected = {f"{name}.weight": shape for name, shape in maps.items()} | {
        f"{name}.bias": shape[:1] for name, shape in maps.items()
    }
    predictor = {
        name.removeprefix("module.backbone."): tensor for name, tensor in checkpoint["predictor"].items()
    }
    expected |= {"mask_tokens.0": (1, 1, 48), "mask_tokens.1": (1, 1, 48)}
    assert {name: tuple(tensor.shape) for name, tensor in predictor.items()} == expected
    assert torch.equal(predictor["mask_tokens.1"].flatten(), load_predictor(ours).mask_tokens[1])
    hf = load_file(
        as_hf / "model.safetensors"
    )  # which transformers has proven: query, key, value, in this order
    parts = [hf[f"encoder.layer.1.attention.{name}.weight"] for name in ("query", "key", "value")]
    assert torch.equal(cleaned["blocks.1.attn.qkv.weight"], torch.cat(parts))
    assert torch.equal(
        cleaned["patch_embed.proj.weight"], hf["encoder.embeddings.patch_embeddings.proj.weight"]
    )


def test_what_cannot_be_exported_is_refused(ours, tmp_path):
    other = save_ours(tmp_path / "other", encoder_config(rope="interleaved"))
    with pytest.raises(ValueError, match="got rope=interleaved, expected vjepa2_tiled"):
        exported(other, tmp_path / "hf", "hf")
    with pytest.raises(
        ValueError, match="got clips of 4 frames of 40 pixels, expected multiples of 2 frames and 16 pixels"
    ):
        exported(ours, tmp_path / "hf", "hf", crop_size=40)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there, which exists"):
        exported(ours, tmp_path / "there", "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"other", "there"}  # nothing is left behind
