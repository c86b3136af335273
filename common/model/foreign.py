"""Video encoders of others: Hugging Face VJEPA2 directories, V-JEPA 2's `.pt` files."""

import functools
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor

from salt_distill.common.config import Config, EncoderConfig, PredictorConfig, ViewConfig, explain
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.layouts import (
    Layout,
    hf_encoder,
    require_fit,
    shapes_of,
    to_ours,
    vjepa2_encoder,
)
from salt_distill.common.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from salt_distill.common.model.vit import Encoder

M = TypeVar("M", bound=BaseModel)

PT_CONFIG = "salt"
"""Key of a `.pt` of ours under which its configuration stands; V-JEPA 2's loaders pass over it."""
NUM_HEADS = {(192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16, (1408, 40): 22}
"""Attention heads by (width, depth) of V-JEPA 2's vit_tiny, small, base, large, huge and giant_xformers: no
tensor tells them. The released ViT-g has 22; the paper's (arXiv:2509.24317, Table 3) has 16, and its files
say so under PT_CONFIG. No ViT-G (1664, 48) was released: 16 or 26."""


class PtConfig(Config):
    """What our `.pt` files say about themselves."""

    encoder: EncoderConfig
    predictor: PredictorConfig | None = None
    """None where the file holds no predictor."""
    view: ViewConfig = ViewConfig()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class _HfConfig(BaseModel):
    """``config.json`` of a VJEPA2 model, with the format's own defaults; only what an encoder depends on."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["vjepa2"]
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: int = 16
    tubelet_size: int = 2
    layer_norm_eps: float = 1e-6
    crop_size: int = 256
    frames_per_clip: int = 64
    in_chans: Literal[3] = 3
    qkv_bias: Literal[True] = True
    hidden_act: Literal["gelu"] = "gelu"
    salt_view: ViewConfig = ViewConfig()
    """The clips that the encoder was trained on, in a directory of ours: so that it is probed on the same."""


class HfProcessor(BaseModel):
    """The normalisation that stands beside a model."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD


def hf_model_type(directory: Path) -> str | None:
    """What kind of Hugging Face model a directory holds; None: it holds none."""
    path = directory / "config.json"
    return json.loads(path.read_text()).get("model_type") if path.is_file() else None


def open_hf(directory: Path) -> FrozenEncoder:
    """The encoder of a VJEPA2 directory, with a classifier around it or without."""
    found = validated(_HfConfig, directory / "config.json")
    config = EncoderConfig(
        width=found.hidden_size,
        depth=found.num_hidden_layers,
        num_heads=found.num_attention_heads,
        mlp_width=int(found.hidden_size * found.mlp_ratio),  # as transformers rounds it
        patch_size=found.patch_size,
        tubelet_size=found.tubelet_size,
        rope="vjepa2_tiled",
        norm_eps=found.layer_norm_eps,
    )
    processor = hf_processor(directory)
    return FrozenEncoder(
        name=directory.resolve().name,
        config=config,
        view=found.salt_view.model_copy(
            update={"num_frames": found.frames_per_clip, "crop_size": found.crop_size}
        ),
        mean=processor.image_mean,
        std=processor.image_std,
        load=functools.partial(_load_hf, directory, config),
    )


def hf_processor(directory: Path) -> HfProcessor:
    """What a directory says about its inputs, or the format's defaults."""
    paths = (directory / name for name in ("video_preprocessor_config.json", "preprocessor_config.json"))
    return next((validated(HfProcessor, path) for path in paths if path.is_file()), HfProcessor())


def validated(kind: type[M], path: Path) -> M:
    try:
        return kind.model_validate_json(path.read_text())
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error


def _load_hf(directory: Path, config: EncoderConfig) -> Encoder:
    """Only the encoder's tensors are read. The predictor and a classifier's head may be there; anything else
    may not."""
    found = hf_tensors(directory, "vjepa2.", others=("predictor.", "pooler.", "classifier."))
    return _encoder_of(found, config, hf_encoder(config), f"{directory} does not fit its config.json")


def hf_tensors(directory: Path, prefix: str, *, others: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors by name, without ``prefix`` and without those whose name begins with one of ``others``."""
    found: dict[str, Tensor] = {}
    for file in _hf_files(directory):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the file is no mapping
                plain = name.removeprefix(prefix)
                if not plain.startswith(others):
                    found[plain] = tensors.get_tensor(name)
    return found


def _hf_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    for name in names:
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: got no {name}, expected the model's weights as safetensors")
    return [directory / name for name in names]


def open_pt(path: Path) -> FrozenEncoder:
    """The encoder of a V-JEPA 2 file: `target_encoder`, or `encoder` where there is no other.

    The moving average is what V-JEPA 2's evaluations load. Sizes are read off the tensors.
    """
    checkpoint = _read_pt(path)
    if PT_CONFIG in checkpoint:
        try:
            own = PtConfig.model_validate(checkpoint[PT_CONFIG])
        except pydantic.ValidationError as error:
            raise ValueError(f"{path}, key {PT_CONFIG!r}: {explain(error)}") from error
    else:
        own = PtConfig(encoder=_config_of(_pt_encoder(checkpoint, path), path))
    return FrozenEncoder(
        name=path.resolve().name,
        config=own.encoder,
        view=own.view,
        mean=own.mean,
        std=own.std,
        load=functools.partial(_load_pt, path, own.encoder),
    )


def _load_pt(path: Path, config: EncoderConfig) -> Encoder:
    return _encoder_of(
        _pt_encoder(_read_pt(path), path), config, vjepa2_encoder(config), f"{path} is no encoder that fits"
    )


def _read_pt(path: Path) -> dict[str, Any]:
    """The file's mapping; its tensors stay on disk until they are used (an optimizer's may be larger than the
    model's)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: got no file of tensors and plain values, expected what torch.save writes of those:"
            f" {error}"
        ) from error
    if not isinstance(checkpoint, dict) or not {"encoder", "target_encoder"} & set(checkpoint):
        keys = (
            ", ".join(map(str, list(checkpoint)[:8]))
            if isinstance(checkpoint, dict)
            else type(checkpoint).__name__
        )
        raise ValueError(
            f"{path}: got keys {keys}, expected `encoder` or `target_encoder`: a probe's file holds no"
            " encoder"
        )
    return checkpoint


def _pt_encoder(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Tensors by name, the wrappers' prefixes taken off."""
    key = "target_encoder" if "target_encoder" in checkpoint else "encoder"
    found = {re.sub(r"^(module\.|backbone\.)+", "", name): tensor for name, tensor in checkpoint[key].items()}
    # V-JEPA 2's released files carry a sine table, `pos_embed`, that nothing reads. V-JEPA 1 adds the same
    # table to its tokens and has no RoPE.
    if "pos_embed" in found:
        predictor = {name.rpartition("backbone.")[2] for name in checkpoint.get("predictor", ())}
        if (
            "predictor_pos_embed" in predictor
            and sum(name.startswith("mask_tokens.") for name in predictor) == 2
        ):
            raise ValueError(
                f"{path}: got a V-JEPA 1 file (it adds pos_embed to its tokens), expected V-JEPA 2, whose"
                " positions are rotary"
            )
        del found["pos_embed"]
    return found


def _config_of(tensors: Mapping[str, Tensor], path: Path) -> EncoderConfig:
    """What the tensors of a file without a configuration are."""
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
    if (width, depth) not in NUM_HEADS:
        known = "; ".join(f"{key[0]} x {key[1]}: {heads}" for key, heads in NUM_HEADS.items())
        raise ValueError(
            f"{path}: got {depth} blocks of width {width}, and no tensor tells the attention heads; known are"
            f" (width x blocks: heads) {known}. Add a key {PT_CONFIG!r} to the file with the encoder's"
            " configuration (docs/checkpoints.md)"
        )
    return EncoderConfig(
        width=width,
        depth=depth,
        num_heads=NUM_HEADS[width, depth],
        mlp_width=up.shape[0],
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        rope="vjepa2_tiled",
    )


def _encoder_of(found: dict[str, Tensor], config: EncoderConfig, layout: Layout, where: str) -> Encoder:
    require_fit({name: tensor.shape for name, tensor in found.items()}, shapes_of(layout), where)
    encoder = Encoder(config)
    encoder.load_state_dict(to_ours(found, layout, encoder.state_dict()))
    return encoder.eval()
