"""Hugging Face directories: what all of them share, and VJEPA2's encoder."""

import functools
from pathlib import Path
from typing import Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import Tensor

from salt_distill.common.config import MAX_DEPTH, MAX_WIDTH, EncoderConfig, ViewConfig, explain
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.layouts import (
    Layout,
    hf_encoder,
    require_fit,
    shapes_of,
    to_ours,
)
from salt_distill.common.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from salt_distill.common.model.vit import Encoder
from salt_distill.common.text_files import read_text

M = TypeVar("M", bound=BaseModel)


class VJepa2DirectoryConfig(BaseModel):
    """``config.json`` of a VJEPA2 model, with the format's own defaults; only what an encoder depends on."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["vjepa2"]
    hidden_size: int = Field(default=1024, le=MAX_WIDTH)
    num_hidden_layers: int = Field(default=24, le=MAX_DEPTH)
    num_attention_heads: int = 16
    mlp_ratio: float = Field(default=4.0, gt=0, le=16)
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


class _OfAnyKind(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model_type: str | None = None


class _WeightIndex(BaseModel):
    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, str]
    """The file of each tensor."""


def hf_model_type(directory: Path) -> str | None:
    """What kind of Hugging Face model a directory holds; None: it holds none."""
    path = directory / "config.json"
    return validated(_OfAnyKind, path).model_type if path.is_file() else None


def open_hf(directory: Path) -> FrozenEncoder:
    """The encoder of a VJEPA2 directory, with a classifier around it or without."""
    theirs = validated(VJepa2DirectoryConfig, directory / "config.json")
    config = EncoderConfig(
        width=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        mlp_width=int(theirs.hidden_size * theirs.mlp_ratio),  # as transformers rounds it
        patch_size=theirs.patch_size,
        tubelet_size=theirs.tubelet_size,
        rope="vjepa2_tiled",
        norm_eps=theirs.layer_norm_eps,
    )
    processor = hf_processor(directory)
    return FrozenEncoder(
        name=directory.resolve().name,
        config=config,
        view=theirs.salt_view.model_copy(
            update={"num_frames": theirs.frames_per_clip, "crop_size": theirs.crop_size}
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
        return kind.model_validate_json(read_text(path))
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error


def _load_hf(directory: Path, config: EncoderConfig) -> Encoder:
    """Only the encoder's tensors are read. The predictor and a classifier's head may be there; anything else
    may not."""
    tensors = hf_tensors(directory, "vjepa2.", others=("predictor.", "pooler.", "classifier."))
    return _encoder_of(tensors, config, hf_encoder(config), f"{directory} does not fit its config.json")


def hf_tensors(directory: Path, prefix: str, *, others: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors by name, without ``prefix`` and without those whose name begins with one of ``others``."""
    tensors: dict[str, Tensor] = {}
    for file in _hf_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - the file is no mapping
                plain = name.removeprefix(prefix)
                if not plain.startswith(others):
                    tensors[plain] = opened.get_tensor(name)
    return tensors


def _hf_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    names = (
        sorted(set(validated(_WeightIndex, index).weight_map.values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    for name in names:
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: got no {name}, expected the model's weights as safetensors")
    return [directory / name for name in names]


def _encoder_of(tensors: dict[str, Tensor], config: EncoderConfig, layout: Layout, where: str) -> Encoder:
    require_fit({name: tensor.shape for name, tensor in tensors.items()}, shapes_of(layout), where)
    encoder = Encoder(config)
    encoder.load_state_dict(to_ours(tensors, layout, encoder.state_dict()))
    return encoder.eval()
