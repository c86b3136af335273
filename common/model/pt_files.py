"""Encoders in the `.pt` and `.pth` files of others: V-JEPA, V-JEPA 2 and 2.1, VideoMAE, VideoMAEv2, MVD."""

import argparse
import functools
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from salt_distill.common.config import Config, EncoderConfig, PredictorConfig, ViewConfig, explain
from salt_distill.common.model.frozen import AbsoluteConfig, FrozenEncoder
from salt_distill.common.model.layouts import new_encoder, require_fit, shapes_of, to_ours, vjepa2_encoder
from salt_distill.common.model.pixels import IMAGENET_MEAN, IMAGENET_STD

PT_CONFIG = "salt"
"""Key of a `.pt` of ours under which its configuration stands; V-JEPA 2's loaders pass over it. Others' files
get it where no tensor tells their heads."""
KEYS = ("target_encoder", "ema_encoder", "encoder", "model", "module", "state_dict")
"""Where a file holds its tensors, the first that it has; a moving average goes before what it follows."""
NUM_FRAMES = 16
"""Of the clips of all of them; no tensor tells it."""
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""What torch's wrappers put into names, anywhere."""
_PREFIXES = re.compile(r"^(module\.|backbone\.|model\.)+")
_BESIDE_THE_ENCODER = (
    *("decoder", "encoder_to_decoder.", "mask_token", "fc_norm.", "head."),
    *("down_img.", "down_vid.", "pos_embed_img", "pos_embed_vid"),
    *("patch_embed_img.", "img_mod_embed"),
)  # fmt: skip
"""What tensors of decoders, classifiers, and of V-JEPA 2.1's way for images, begin with."""


class PtConfig(Config):
    """What our `.pt` files say about themselves, and others' where somebody added it."""

    encoder: EncoderConfig
    predictor: PredictorConfig | None = None
    """None where the file holds no predictor."""
    view: ViewConfig = ViewConfig()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class Family(Enum):
    """Whose file an encoder comes in."""

    VJEPA1 = "V-JEPA"
    VJEPA2 = "V-JEPA 2"
    VJEPA21 = "V-JEPA 2.1"
    VIDEOMAE = "VideoMAE"


_COMMON_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16}
_VJEPA_HEADS = {(192, 12): 3, **_COMMON_HEADS, (1408, 40): 22}
NUM_HEADS = {
    Family.VJEPA1: _VJEPA_HEADS,
    Family.VJEPA2: _VJEPA_HEADS,
    Family.VJEPA21: _VJEPA_HEADS | {(1664, 48): 26},
    Family.VIDEOMAE: _COMMON_HEADS | {(1408, 40): 16},
}
"""Attention heads by (width, depth) of the sizes in each one's code: no tensor tells them. The released ViT-g
of V-JEPA 2 has 22; the paper's (arXiv:2509.24317, Table 3) has 16, and its files say so under PT_CONFIG. No
ViT-G (1664, 48) of V-JEPA 2 was released: 16 or 26."""

_NEVER_LEFT_OUT = ("width", "depth", "num_heads", "mlp_width")
"""Under PT_CONFIG: a default would be another encoder's, and no tensor contradicts the default of heads."""

_OLD_FORMAT = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
"""How a file of torch before 1.6 begins: a pickled number."""


def open_pt(path: Path) -> FrozenEncoder:
    """The encoder of a file: its moving average where there is one, which is what V-JEPA 2's evaluations
    load. Sizes are read off the tensors."""
    checkpoint = _read(path)
    tensors, family = _encoder(checkpoint, path)
    if PT_CONFIG in checkpoint:
        about = _added(checkpoint[PT_CONFIG], family, f"{path}, key {PT_CONFIG!r}")
    else:
        about = PtConfig(encoder=EncoderConfig.model_validate(_block_sizes(tensors, family, path)))
    config: EncoderConfig | AbsoluteConfig = about.encoder
    view = about.view
    if family is Family.VJEPA21:
        config = about.encoder.model_copy(update={"rope": "vjepa2_1"})
    elif family is not Family.VJEPA2:
        config, view = _absolute(tensors, about, path)
    return FrozenEncoder(
        name=path.resolve().name,
        config=config,
        view=view,
        mean=about.mean,
        std=about.std,
        load=functools.partial(_load, path, config),
    )


def _added(values: Any, family: Family, where: str) -> PtConfig:
    """What stands under PT_CONFIG. Raises ValueError where an encoder of the family cannot be so."""
    try:
        about = PtConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from error
    given = about.encoder.model_fields_set
    if missing := [name for name in _NEVER_LEFT_OUT if name not in given]:
        raise ValueError(
            f"{where}: got an encoder without {', '.join(missing)}, expected {', '.join(_NEVER_LEFT_OUT)}:"
            " add what is missing"
        )
    rope = "vjepa2_1" if family is Family.VJEPA21 else None
    if family is not Family.VJEPA2 and "rope" in given and about.encoder.rope != rope:
        raise ValueError(
            f"{where}: got encoder.rope={about.encoder.rope}, expected {rope or 'none'}: the tensors are"
            f" {family.value}'s, which tells their positions; leave encoder.rope out"
        )
    return about


def _load(path: Path, config: EncoderConfig | AbsoluteConfig) -> nn.Module:
    tensors, _ = _encoder(_read(path), path)
    layout = vjepa2_encoder(config)
    require_fit(
        {name: tensor.shape for name, tensor in tensors.items()},
        shapes_of(layout),
        f"{path} is no encoder that fits",
    )
    encoder = new_encoder(config)
    encoder.load_state_dict(to_ours(tensors, layout, encoder.state_dict()))
    return encoder.eval()


def _read(path: Path) -> dict[str, Any]:
    """The file's mapping; its tensors stay on disk until they are used (an optimizer's may be larger than the
    model's)."""
    _require_archive(path)
    try:
        # VideoMAE's files hold the arguments of their command: an object of names and plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: got no file of tensors and plain values, expected what torch.save writes of those:"
            f" {error}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: got a {type(checkpoint).__name__}, expected a mapping of names to tensors")
    return checkpoint


def _require_archive(path: Path) -> None:
    """Raises ValueError where a file is not what torch.save writes, which torch says in words of its own."""
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            return
        file.seek(0)
        is_old = file.read(len(_OLD_FORMAT)) == _OLD_FORMAT
    if is_old:
        raise ValueError(
            f"{path}: got a file in the format of torch before 1.6, expected today's: read it with torch.load"
            " and write it with torch.save"
        )
    raise ValueError(
        f"{path}: got a file that torch.save did not write, or only a part of one, expected weights: copy it"
        " again, or give another file"
    )


def _encoder(checkpoint: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], Family]:
    """The tensors of a file's encoder under V-JEPA 2's names, and whose they are."""
    held = next((checkpoint[key] for key in KEYS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    tensors = {
        _PREFIXES.sub("", _WRAPPERS.sub("", name)): tensor
        for name, tensor in held.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if any(name.startswith("encoder.") for name in tensors):  # beside a decoder
        tensors = {
            name.removeprefix("encoder."): tensor
            for name, tensor in tensors.items()
            if name.startswith("encoder.")
        }
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BESIDE_THE_ENCODER)}
    if not tensors:
        keys = ", ".join(map(str, list(checkpoint)[:8]))
        raise ValueError(
            f"{path}: got keys {keys}, expected an encoder's tensors, bare or under one of"
            f" {', '.join(KEYS)}: a probe's file holds no encoder"
        )
    family = _family(tensors, checkpoint)
    if family is Family.VIDEOMAE:
        _join_biases(tensors)
    elif family is Family.VJEPA2:
        tensors.pop("pos_embed", None)  # a sine table in the released files, which nothing reads
    elif family is Family.VJEPA21:
        _drop_levels(tensors)
    return tensors, family


def _family(tensors: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> Family:
    """Whose tensors these are. V-JEPA 1 adds its ``pos_embed`` to its tokens; V-JEPA 2 has that table too,
    and another predictor."""
    if any(name.endswith("attn.q_bias") for name in tensors):
        return Family.VIDEOMAE
    if "norms_block.0.weight" in tensors:
        return Family.VJEPA21
    predictor = {name.rpartition("backbone.")[2] for name in checkpoint.get("predictor", ())}
    num_mask_tokens = sum(name.startswith("mask_tokens.") for name in predictor)
    if "pos_embed" in tensors and "predictor_pos_embed" in predictor and num_mask_tokens == 2:
        return Family.VJEPA1
    return Family.VJEPA2


def _join_biases(tensors: dict[str, Tensor]) -> None:
    """VideoMAE's queries and values have a bias, its keys none."""
    for name in [name for name in tensors if name.endswith("attn.q_bias")]:
        block, query = name.removesuffix("q_bias"), tensors.pop(name)
        value = tensors.pop(f"{block}v_bias", None)
        if value is not None:
            tensors[f"{block}qkv.bias"] = torch.cat((query, torch.zeros_like(query), value))


def _drop_levels(tensors: dict[str, Tensor]) -> None:
    """V-JEPA 2.1 has a norm after each quarter of its blocks, of which the last gives its tokens, and tells
    videos from images by a vector, which is added to every token as the patch embedding's bias is."""
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("norms_block."))
    for name in [name for name in tensors if name.startswith("norms_block.")]:
        _, level, part = name.split(".")
        tensor = tensors.pop(name)
        if int(level) == last:
            tensors[f"norm.{part}"] = tensor
    bias = tensors.get("patch_embed.proj.bias")
    if "video_mod_embed" in tensors and bias is not None:
        tensors["patch_embed.proj.bias"] = bias + tensors.pop("video_mod_embed").flatten()


def _block_sizes(tensors: Mapping[str, Tensor], family: Family, path: Path) -> dict[str, int]:
    """Sizes of blocks and patches, by their keys in a configuration."""
    patch, up = (tensors.get(name) for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"))
    if (
        patch is None
        or up is None
        or patch.ndim != 5
        or patch.shape[1] != 3
        or patch.shape[3] != patch.shape[4]
    ):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (patch, up)]
        raise ValueError(
            f"{path}: got patch_embed.proj.weight {shapes[0]} and blocks.0.mlp.fc1.weight {shapes[1]},"
            " expected a video ViT's (width, 3, frames, pixels, pixels) and (hidden, width)"
        )
    width, _, tubelet_size, patch_size, _ = patch.shape
    depth = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name)))
    if (width, depth) not in NUM_HEADS[family]:
        known = "; ".join(f"{key[0]} x {key[1]}: {heads}" for key, heads in NUM_HEADS[family].items())
        raise ValueError(
            f"{path}: got {depth} blocks of width {width}, and no tensor tells the attention heads; known of"
            f" {family.value} are (width x blocks: heads) {known}. Add a key {PT_CONFIG!r} to the file with"
            " width, depth, num_heads and mlp_width of the encoder, and patch_size where it is not 16"
            " (docs/checkpoints.md)"
        )
    return {
        "width": width,
        "depth": depth,
        "num_heads": NUM_HEADS[family][width, depth],
        "mlp_width": up.shape[0],
        "patch_size": patch_size,
        "tubelet_size": tubelet_size,
    }


def _absolute(
    tensors: Mapping[str, Tensor], about: PtConfig, path: Path
) -> tuple[AbsoluteConfig, ViewConfig]:
    """An encoder whose positions are sines, or a table among its tensors; and the clips that they are for."""
    encoder = about.encoder
    steps, positions = NUM_FRAMES // encoder.tubelet_size, tensors.get("pos_embed")
    side = 224 // encoder.patch_size if positions is None else math.isqrt(positions.shape[1] // steps)
    if positions is not None and positions.shape[1] != steps * side**2:
        raise ValueError(
            f"{path}: got {positions.shape[1]} positions, expected those of a square clip of"
            f" {NUM_FRAMES} frames"
        )
    config = AbsoluteConfig(
        positions="sine" if positions is None else "stored",
        num_tokens=steps * side**2,
        block_eps=encoder.norm_eps,
        norm_eps=encoder.norm_eps if "norm.weight" in tensors else None,
        **encoder.model_dump(exclude={"rope", "norm_eps"}),
    )
    view = ViewConfig(num_frames=NUM_FRAMES, crop_size=side * encoder.patch_size)
    if "view" not in about.model_fields_set:
        return config, view
    if about.view.clip_shape != view.clip_shape:
        raise ValueError(
            f"{path}, key {PT_CONFIG!r}: got a view of {about.view.num_frames} frames of"
            f" {about.view.size_text} pixels, expected {view.num_frames} of {view.size_text}, whose positions"
            " the encoder was trained with: leave num_frames and crop_size out"
        )
    return config, about.view
