"""Files of the encoders that the paper compares with, each against its own formula at random weights."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from salt_distill.common.config import FrozenConfig, TeacherComputeConfig
from salt_distill.common.model.checkpoint import load_encoder, open_encoder
from salt_distill.common.model.teacher import Teacher

BLOCKS = 12
HEADS = {128: 2, 192: 3, 384: 6}
STEPS = 8  # 16 frames


def random_tensors(width: int, patch: int, *, biases: bool, norm: str | None) -> dict[str, torch.Tensor]:
    """Of a ViT with V-JEPA's names, or VideoMAE's, whose queries and values alone have a bias."""
    generator = torch.Generator().manual_seed(0)

    def norms(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes = {"patch_embed.proj.weight": (width, 3, 2, patch, patch), "patch_embed.proj.bias": (width,)}
    for block in (f"blocks.{number}" for number in range(BLOCKS)):
        shapes |= norms(f"{block}.norm1") | norms(f"{block}.norm2")
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", 2 * width, width) | linear(f"{block}.mlp.fc2", width, 2 * width)
        if not biases:
            del shapes[f"{block}.attn.qkv.bias"]
            shapes |= {f"{block}.attn.q_bias": (width,), f"{block}.attn.v_bias": (width,)}
    shapes |= {} if norm is None else norms(norm)
    return {
        name: 0.05 * torch.randn(shape, generator=generator) + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def expected(
    tensors: dict[str, torch.Tensor], clip: torch.Tensor, added: torch.Tensor, norm: str | None, turn=None
) -> torch.Tensor:
    """Tokens by the formula, written out. ``added``: to the tokens; ``turn``: of queries and keys."""
    patch = tensors["patch_embed.proj.weight"]
    x = F.conv3d(clip, patch, tensors["patch_embed.proj.bias"], patch.shape[2:]).flatten(2).mT + added
    width = patch.shape[0]

    def normed(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    for block in (f"blocks.{number}" for number in range(BLOCKS)):
        if (bias := tensors.get(f"{block}.attn.qkv.bias")) is None:
            query, value = tensors[f"{block}.attn.q_bias"], tensors[f"{block}.attn.v_bias"]
            bias = torch.cat((query, torch.zeros(width), value))
        qkv = F.linear(normed(f"{block}.norm1", x), tensors[f"{block}.attn.qkv.weight"], bias)
        q, k, v = qkv.reshape(1, -1, 3, HEADS[width], 64).permute(2, 0, 3, 1, 4)
        if turn is not None:
            q, k = turn(q), turn(k)
        attended = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, tensors[f"{block}.attn.proj.weight"], tensors[f"{block}.attn.proj.bias"])
        hidden = F.linear(
            normed(f"{block}.norm2", x), tensors[f"{block}.mlp.fc1.weight"], tensors[f"{block}.mlp.fc1.bias"]
        )
        x = x + F.linear(F.gelu(hidden), tensors[f"{block}.mlp.fc2.weight"], tensors[f"{block}.mlp.fc2.bias"])
    return x if norm is None else normed(norm, x)


def clip_of(side: int, num_frames: int = 16) -> torch.Tensor:
    return torch.randn(1, 3, num_frames, side, side, generator=torch.Generator().manual_seed(1))


def sines(num_tokens: int, width: int) -> torch.Tensor:
    table = np.zeros((num_tokens, width), np.float64)
    for token in range(num_tokens):
        for channel in range(width):
            angle = token / 10_000 ** (2 * (channel // 2) / width)
            table[token, channel] = np.cos(angle) if channel % 2 else np.sin(angle)
    return torch.from_numpy(table).float()


def same(path, clip: torch.Tensor, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(path)(clip), tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", ["pre-training", "fine-tuning"])
def test_files_of_videomae_are_read(stage, tmp_path):
    path, norm = tmp_path / "checkpoint.pth", "norm" if stage == "pre-training" else None
    tensors = random_tensors(384, 56, biases=False, norm=norm)  # large patches: few tokens
    if norm:
        held = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        others = {"decoder.head.weight": torch.zeros(3), "mask_token": torch.zeros(1, 1, 3)}
        arguments = argparse.Namespace(model="pretrain_videomae_small_patch16_224", lr=1e-3)
        torch.save({"model": held | others, "optimizer": {}, "args": arguments}, path)
    else:
        others = {name: torch.zeros(384) for name in ("fc_norm.weight", "fc_norm.bias", "head.bias")}
        torch.save({"module": tensors | others}, path)
    clip = clip_of(224)
    same(path, clip, expected(tensors, clip, sines(STEPS * 4**2, 384), norm))
    found = open_encoder(FrozenConfig(ckpt=str(path)))
    assert (found.view.clip_shape, found.grid) == ((16, 224, 224, 3), (8, 4, 4))
    with pytest.raises(ValueError, match="got clips of 8 frames of 448 pixels, expected 16 of 224"):
        open_encoder(FrozenConfig(ckpt=str(path), num_frames=8, crop_size=448))


def test_a_table_of_positions_comes_with_the_weights(tmp_path):
    """MVD's has it beside the tensors of two decoders, V-JEPA 1's in a file that tells by its predictor."""
    table, clip = torch.randn(1, STEPS * 2**2, 384), clip_of(32)
    mvd = random_tensors(384, 16, biases=False, norm="norm")
    others = {name: torch.zeros(1) for name in ("pos_embed_img", "down_vid.bias", "decoder_img.head.bias")}
    torch.save({"model": mvd | others | {"pos_embed": table}}, tmp_path / "mvd.pth")
    same(tmp_path / "mvd.pth", clip, expected(mvd, clip, table, "norm"))

    vjepa = random_tensors(192, 16, biases=True, norm="norm")
    table = torch.randn(1, STEPS * 2**2, 192)
    held = {f"module.backbone.{name}": tensor for name, tensor in (vjepa | {"pos_embed": table}).items()}
    names = ("predictor_pos_embed", "mask_tokens.0", "mask_tokens.1")
    predictor = {f"module.backbone.{name}": torch.zeros(1) for name in names}
    torch.save({"target_encoder": held, "predictor": predictor}, tmp_path / "vitt16.pth.tar")
    same(tmp_path / "vitt16.pth.tar", clip, expected(vjepa, clip, table, "norm"))
    assert open_encoder(FrozenConfig(ckpt=str(tmp_path / "vitt16.pth.tar"))).view.clip_shape == (
        16,
        32,
        32,
        3,
    )

    teachers = []
    for positions in (table, table + 1):  # what is added is part of what the teacher is
        held["module.backbone.pos_embed"] = positions
        torch.save({"target_encoder": held, "predictor": predictor}, tmp_path / "x.pt")
        teachers.append(Teacher.load(tmp_path / "x.pt", TeacherComputeConfig(), torch.device("cpu")))
    assert teachers[0].spec.fingerprint != teachers[1].spec.fingerprint
    assert teachers[0].forward(np.zeros((1, 16, 32, 32, 3), np.uint8)).shape == (1, STEPS * 2**2, 192)

    torch.save({"model": mvd | {"pos_embed": table[:, :30]}}, tmp_path / "mvd.pth")
    with pytest.raises(ValueError, match="got 30 positions, expected those of a square clip of 16 frames"):
        load_encoder(tmp_path / "mvd.pth")


def turned_as_in_vjepa_2_1(x: torch.Tensor, side: int) -> torch.Tensor:
    """Channels of a head in pairs: ten of time, ten of height, ten of width, two that stay."""
    token = torch.arange(x.shape[-2])
    step, row, column = token // side**2, token // side % side, token % side
    axes = (step, row * 15 / (side - 1), column * 15 / (side - 1))
    speed = 10_000 ** (-torch.arange(10) / 10)
    angle = F.pad(torch.cat([axis[:, None] * speed for axis in axes], dim=1), (0, 2))
    first, second = x[..., ::2], x[..., 1::2]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.stack(turned, dim=-1).flatten(-2)


@pytest.mark.parametrize("side", [2, 6])
def test_files_of_vjepa_2_1_are_read(side, tmp_path):
    plain, mode = random_tensors(192, 16, biases=True, norm="norms_block.3"), torch.randn(1, 1, 192)
    held = plain | {
        "video_mod_embed": mode,
        "img_mod_embed": torch.zeros(1, 1, 192),
        "patch_embed_img.proj.bias": torch.zeros(192),
        **{
            f"norms_block.{level}.{part}": torch.zeros(192)
            for level in range(3)
            for part in ("weight", "bias")
        },
    }
    ema = {f"module.backbone.{name}": tensor for name, tensor in held.items()}
    torch.save(
        {"encoder": {name: 2 * tensor for name, tensor in ema.items()}, "ema_encoder": ema}, tmp_path / "x.pt"
    )
    clip = clip_of(16 * side, 4)
    turn = lambda x: turned_as_in_vjepa_2_1(x, side)  # noqa: E731 - of this side
    same(tmp_path / "x.pt", clip, expected(plain, clip, mode, "norms_block.3", turn))


@pytest.mark.parametrize("wrapped", ["", "_orig_mod.", "module._orig_mod.backbone.", "model."])
def test_bare_tensors_are_read_whatever_wrapped_them(wrapped, tmp_path):
    tensors = random_tensors(192, 16, biases=True, norm="norm")
    names = {name: wrapped + name.replace("attn.", "_checkpoint_wrapped_module.attn.") for name in tensors}
    torch.save({names[name]: tensor for name, tensor in tensors.items()}, tmp_path / "x.pt")
    state = load_encoder(tmp_path / "x.pt").state_dict()
    assert torch.equal(state["blocks.3.attn.w_out.weight"], tensors["blocks.3.attn.proj.weight"])
    torch.save(
        {names[name]: tensor for name, tensor in tensors.items()} | {"extra": torch.ones(1)},
        tmp_path / "x.pt",
    )
    with pytest.raises(ValueError, match="extra is not expected"):
        load_encoder(tmp_path / "x.pt")


SAID = {"width": 128, "depth": BLOCKS, "num_heads": HEADS[128], "mlp_width": 256}
"""Of a size that nobody's code has."""


def of_unknown_size(kind: str) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """A file without a configuration, a clip, and its tokens by the formula."""
    table, clip = torch.randn(1, STEPS * 2**2, 128, generator=torch.Generator().manual_seed(2)), clip_of(32)
    norm = {"VideoMAE, fine-tuned": None, "V-JEPA 2.1": "norms_block.0"}.get(kind, "norm")
    is_videomae = kind.startswith("VideoMAE")
    patch = 56 if is_videomae else 16
    tensors = random_tensors(128, patch, biases=kind.startswith("V-JEPA"), norm=norm)
    if is_videomae:
        clip = clip_of(224)
        return {"model": tensors}, clip, expected(tensors, clip, sines(STEPS * 4**2, 128), norm)
    if kind == "V-JEPA 2.1":
        turn = lambda x: turned_as_in_vjepa_2_1(x, 2)  # noqa: E731 - of this side
        return {"ema_encoder": tensors}, clip, expected(tensors, clip, torch.zeros(()), norm, turn)
    names = ("predictor_pos_embed", "mask_tokens.0", "mask_tokens.1")
    beside = {"predictor": dict.fromkeys(names, torch.zeros(1))} if kind == "V-JEPA" else {}
    return {"model": tensors | {"pos_embed": table}, **beside}, clip, expected(tensors, clip, table, norm)


@pytest.mark.parametrize("kind", ["VideoMAE", "VideoMAE, fine-tuned", "MVD", "V-JEPA", "V-JEPA 2.1"])
def test_a_file_that_is_told_its_heads_keeps_its_own_positions(kind, tmp_path):
    checkpoint, clip, tokens = of_unknown_size(kind)
    path, patch = tmp_path / "x.pth", {"patch_size": 56} if kind.startswith("VideoMAE") else {}
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError, match=r"128, and no tensor tells the attention heads; .* Add a key 'salt'.*num_heads"
    ):
        load_encoder(path)
    torch.save(checkpoint | {"salt": {"encoder": SAID | patch}}, path)
    same(path, clip, tokens)


@pytest.mark.parametrize(
    ("kind", "key", "sentence"),
    [
        (
            "VideoMAE",
            {"encoder": SAID | {"patch_size": 56, "rope": "vjepa2_tiled"}},
            r"key 'salt': got encoder.rope=vjepa2_tiled, expected none: the tensors are VideoMAE's",
        ),
        (
            "V-JEPA 2.1",
            {"encoder": SAID | {"rope": "vjepa2_tiled"}},
            r"got encoder.rope=vjepa2_tiled, expected vjepa2_1: the tensors are V-JEPA 2.1's",
        ),
        (
            "V-JEPA 2.1",
            {"encoder": {"width": 128, "depth": BLOCKS, "mlp_width": 256}},
            "got an encoder without num_heads, expected width, depth, num_heads, mlp_width",
        ),
        (
            "VideoMAE",
            {"encoder": SAID | {"patch_size": 56}, "view": {"num_frames": 8, "crop_size": 112}},
            "got a view of 8 frames of 112 pixels, expected 16 of 224",
        ),
        (
            "VideoMAE",
            {"encoder": SAID},
            r"patch_embed.proj.weight: got \(128, 3, 2, 56, 56\), expected \(128, 3, 2, 16, 16\)",
        ),
        ("MVD", {"encoder": SAID | {"depth": 11}}, "blocks.11.norm1.weight is not expected"),
    ],
)
def test_what_a_file_is_told_and_its_tensors_contradict_is_refused(kind, key, sentence, tmp_path):
    checkpoint, _, _ = of_unknown_size(kind)
    torch.save(checkpoint | {"salt": key}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=sentence):
        load_encoder(tmp_path / "x.pth")
