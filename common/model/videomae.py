"""VideoMAE's encoder, and the decoder that predicts pixels, from a Hugging Face directory."""

import functools
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from salt_distill.common.config import MAX_DEPTH, MAX_WIDTH, ViewConfig
from salt_distill.common.model.absolute import AbsoluteEncoder, no_rotation, sine_table
from salt_distill.common.model.frozen import AbsoluteConfig, FrozenEncoder
from salt_distill.common.model.hugging_face import hf_processor, hf_tensors, validated
from salt_distill.common.model.layouts import Layout, require_fit, shapes_of, to_ours
from salt_distill.common.model.vit import Block, Norm, Stack

_BLOCK = {
    "attn_norm": "layernorm_before",
    "mlp_norm": "layernorm_after", "attn.w_qkv": "attention.attention.{part}",
    "attn.w_out": "attention.output.dense",
    "mlp.w_up": "intermediate.dense", "mlp.w_down": "output.dense",
}  # fmt: skip
"""What a part of our name is called there."""
_ENCODER = _BLOCK | {"patch_embed": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer"}
_DECODER = _BLOCK | {
    "embed": "encoder_to_decoder",
    "blocks": "decoder.decoder_layers",
    "head": "decoder.head",
}
_OF_THE_ENCODER = ("embeddings.", "encoder.", "layernorm.")
_OF_THE_DECODER = ("decoder.", "encoder_to_decoder.", "mask_token")
_OF_A_CLASSIFIER = ("fc_norm.", "classifier.")


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
    hidden_size: int = Field(default=768, le=MAX_WIDTH)
    num_hidden_layers: int = Field(default=12, le=MAX_DEPTH)
    num_attention_heads: int = 12
    intermediate_size: int = Field(default=3072, le=16 * MAX_WIDTH)
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-12
    qv_bias: Literal[True] = True
    use_mean_pooling: bool = True
    """A fine-tuned classifier, whose norm comes after the mean over tokens: the encoder has none."""
    decoder_hidden_size: int = Field(default=384, le=MAX_WIDTH)
    decoder_num_hidden_layers: int = Field(default=4, le=MAX_DEPTH)
    decoder_num_attention_heads: int = 6
    decoder_intermediate_size: int = Field(default=1536, le=16 * MAX_WIDTH)
    norm_pix_loss: bool = True
    """Whether the decoder predicts pixels normalised within each cube."""


class VideoMaeDecoder(nn.Module):
    """From the tokens of visible cubes to the pixels of hidden ones, normalised as ``pixel_targets`` does."""

    positions: Tensor
    unturned: Tensor

    def __init__(self, theirs: VideoMaeDirectoryConfig, num_tokens: int) -> None:
        super().__init__()
        width, self.num_heads = theirs.decoder_hidden_size, theirs.decoder_num_attention_heads
        self.embed = nn.Linear(theirs.hidden_size, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sine_table(num_tokens, width), persistent=False)
        self.register_buffer("unturned", no_rotation(), persistent=False)
        self.blocks = Stack(
            Block(width, self.num_heads, theirs.decoder_intermediate_size, theirs.layer_norm_eps)
            for _ in range(theirs.decoder_num_hidden_layers)
        )
        self.norm = Norm(width)
        self.head = nn.Linear(width, 3 * theirs.tubelet_size * theirs.patch_size**2)

    def forward(
        self, visible: Float[Tensor, "b v e"], visible_idx: Int[Tensor, "b v"], hidden_idx: Int[Tensor, "b k"]
    ) -> Float[Tensor, "b k upqc"]:
        """Predictions for ``hidden_idx``, in its order."""
        seen = self.embed(visible) + self.positions[visible_idx]
        x = torch.cat((seen, self.mask_token + self.positions[hidden_idx]), dim=1)
        rope = self.unturned.expand(-1, 1, 1, x.shape[1], x.shape[2] // self.num_heads)
        return self.head(self.norm(self.blocks(x, rope)[:, visible.shape[1] :]))


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


def load_videomae_decoder(directory: Path) -> VideoMaeDecoder:
    """The decoder of a VideoMAE directory, in eval mode. Raises ValueError where it has none, or one that
    predicts other pixels."""
    theirs = validated(VideoMaeDirectoryConfig, directory / "config.json")
    tensors = _tensors(directory, without=_OF_THE_ENCODER)
    if not tensors:
        raise ValueError(
            f"{directory}: got a model without a decoder, expected one that predicts pixels"
            " (VideoMAEForPreTraining)"
        )
    if not theirs.norm_pix_loss:
        raise ValueError(
            f"{directory}: got norm_pix_loss false in its config.json, expected a decoder that predicts"
            " normalised pixels"
        )
    encoder = open_videomae(directory).config
    assert isinstance(encoder, AbsoluteConfig)
    decoder = VideoMaeDecoder(theirs, encoder.num_tokens)
    shape = (1, 1, theirs.decoder_hidden_size)
    layout = _layout(decoder, _DECODER, "decoder.norm.", {"mask_token": shape})
    _require_fit(tensors, layout, directory)
    decoder.load_state_dict(to_ours(tensors, layout, decoder.state_dict()))
    return decoder.eval()


def _load(directory: Path, config: AbsoluteConfig) -> AbsoluteEncoder:
    shape = (config.width, 3, config.tubelet_size, config.patch_size, config.patch_size)
    with torch.device("meta"):  # a configuration that does not fit may be of any size
        layout = _layout(AbsoluteEncoder(config), _ENCODER, "layernorm.", {"patch_embed.weight": shape})
    tensors = _tensors(directory, without=_OF_THE_DECODER)
    _require_fit(tensors, layout, directory)
    encoder = AbsoluteEncoder(config)
    encoder.load_state_dict(to_ours(tensors, layout, encoder.state_dict()))
    return encoder.eval()


def _tensors(directory: Path, *, without: tuple[str, ...]) -> dict[str, Tensor]:
    """Of the encoder or of the decoder, with the biases' names of the released files."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in hf_tensors(directory, "videomae.", others=(*without, *_OF_A_CLASSIFIER)).items():
        if name.endswith(("q_bias", "v_bias")):
            name = name.replace("q_bias", "query.bias").replace("v_bias", "value.bias")
        tensors[name] = tensor
        if name.endswith("query.bias"):
            tensors[name.replace("query", "key")] = torch.zeros_like(tensor)  # VideoMAE has none
    return tensors


def _require_fit(tensors: dict[str, Tensor], layout: Layout, directory: Path) -> None:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    require_fit(shapes, shapes_of(layout), f"{directory} does not fit its config.json")


def _layout(
    module: nn.Module, words: dict[str, str], norm: str, reshaped: dict[str, tuple[int, ...]]
) -> Layout:
    """Of each of our tensors theirs."""
    layout: Layout = {}
    for name, tensor in module.state_dict().items():
        theirs = norm + name.removeprefix("norm.") if name.startswith("norm.") else name
        for ours, word in words.items():
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
