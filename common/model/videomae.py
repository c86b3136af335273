"""VideoMAE's encoder from a Hugging Face directory."""

import functools
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from salt_distill.common.config import MAX_DEPTH, ViewConfig
from salt_distill.common.model.absolute import AbsoluteEncoder
from salt_distill.common.model.frozen import AbsoluteConfig, FrozenEncoder
from salt_distill.common.model.hugging_face import hf_processor, hf_tensors, validated
from salt_distill.common.model.layouts import Layout, require_fit, shapes_of, to_ours

_WORDS = {
    "patch_embed": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer",
    "attn_norm": "layernorm_before",
    "mlp_norm": "layernorm_after", "attn.w_qkv": "attention.attention.{part}",
    "attn.w_out": "attention.output.dense",
    "mlp.w_up": "intermediate.dense", "mlp.w_down": "output.dense",
}  # fmt: skip
"""What a part of our name is called there."""
_OTHERS = ("decoder.", "encoder_to_decoder.", "mask_token", "fc_norm.", "classifier.")
"""Tensors of a pre-training or classification model that are none of the encoder's."""


class VideoMaeDirectoryConfig(BaseModel):
    """``config.json`` of a VideoMAE model, with the format's own defaults; only what an encoder depends
    on."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["videomae"]
    image_size: int = 224
    patch_size: int = 16
    num_channels: Literal[3] = 3
    num_frames: int = 16
    tubelet_size: int = 2
    hidden_size: int = 768
    num_hidden_layers: int = Field(default=12, le=MAX_DEPTH)
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-12
    qv_bias: Literal[True] = True
    use_mean_pooling: bool = True
    """A fine-tuned classifier, whose norm comes after the mean over tokens: the encoder has none."""


def open_videomae(directory: Path) -> FrozenEncoder:
    """The encoder of a VideoMAE directory, with a decoder or a classifier beside it or without."""
    theirs = validated(VideoMaeDirectoryConfig, directory / "config.json")
    config = AbsoluteConfig(
        width=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        mlp_width=theirs.intermediate_size,
        patch_size=theirs.patch_size,
        tubelet_size=theirs.tubelet_size,
        num_tokens=theirs.num_frames // theirs.tubelet_size * (theirs.image_size // theirs.patch_size) ** 2,
        block_eps=theirs.layer_norm_eps,
        norm_eps=None if theirs.use_mean_pooling else theirs.layer_norm_eps,
    )
    processor = hf_processor(directory)
    return FrozenEncoder(
        name=directory.resolve().name,
        config=config,
        view=ViewConfig(num_frames=theirs.num_frames, crop_size=theirs.image_size),
        mean=processor.image_mean,
        std=processor.image_std,
        load=functools.partial(_load, directory, config),
    )


def _load(directory: Path, config: AbsoluteConfig) -> AbsoluteEncoder:
    tensors: dict[str, Tensor] = {}
    for name, tensor in hf_tensors(directory, "videomae.", others=_OTHERS).items():
        if name.endswith(("q_bias", "v_bias")):  # as the released files call them
            name = name.replace("q_bias", "query.bias").replace("v_bias", "value.bias")
        tensors[name] = tensor
        if name.endswith("query.bias"):
            tensors[name.replace("query", "key")] = torch.zeros_like(tensor)  # VideoMAE has none
    encoder = AbsoluteEncoder(config)
    layout = _layout(encoder)
    require_fit(
        {name: tensor.shape for name, tensor in tensors.items()},
        shapes_of(layout),
        f"{directory} does not fit its config.json",
    )
    encoder.load_state_dict(to_ours(tensors, layout, encoder.state_dict()))
    return encoder.eval()


def _layout(encoder: AbsoluteEncoder) -> Layout:
    """Of each of our tensors theirs."""
    sizes = encoder.config
    reshaped = {
        "patch_embed.weight": (sizes.width, 3, sizes.tubelet_size, sizes.patch_size, sizes.patch_size)
    }
    layout: Layout = {}
    for name, tensor in encoder.state_dict().items():
        theirs = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        for ours, word in _WORDS.items():
            theirs = theirs.replace(ours, word)
        names = (
            [theirs.format(part=part) for part in ("query", "key", "value")]
            if "{part}" in theirs
            else [theirs]
        )
        layout[name] = dict.fromkeys(
            names, reshaped.get(name, (tensor.shape[0] // len(names), *tensor.shape[1:]))
        )
    return layout
