"""The names that V-JEPA 2 and Hugging Face give to our tensors, and the check that every one is there."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from salt_distill.common.config import EncoderConfig
from salt_distill.common.model.absolute import AbsoluteEncoder
from salt_distill.common.model.frozen import AbsoluteConfig
from salt_distill.common.model.vit import Encoder

Shape = tuple[int, ...]
Layout = dict[str, dict[str, Shape]]
"""For each of our tensors theirs with their shapes: ours is theirs joined along the first axis, in our
shape."""
Words = Mapping[str, tuple[str, ...]]
"""What a part of our name, between two dots, is called by others; several words where they hold it in several
tensors."""

_VJEPA2_BLOCK: Words = {
    "attn_norm": ("norm1",), "mlp_norm": ("norm2",), "w_qkv": ("qkv",), "w_out": ("proj",),
    "w_up": ("fc1",), "w_down": ("fc2",),
}  # fmt: skip
_HF_BLOCK: Words = {
    **_VJEPA2_BLOCK, "w_qkv": ("query", "key", "value"), "attn": ("attention",), "blocks": ("layer",),
    "norm": ("layernorm",),
}  # fmt: skip
_VJEPA2_ENCODER: Words = {**_VJEPA2_BLOCK, "patch_embed": ("patch_embed.proj",), "positions": ("pos_embed",)}
_HF_ENCODER: Words = {**_HF_BLOCK, "patch_embed": ("embeddings.patch_embeddings.proj",)}
_VJEPA2_PREDICTOR: Words = {
    **_VJEPA2_BLOCK, "embed": ("predictor_embed",), "blocks": ("predictor_blocks",),
    "norm": ("predictor_norm",), "head": ("predictor_proj",),
}  # fmt: skip
_HF_PREDICTOR: Words = {
    **_HF_BLOCK, "embed": ("embeddings.predictor_embeddings",), "mask_tokens": ("embeddings.mask_tokens",),
    "head": ("proj",),
}  # fmt: skip


def new_encoder(config: EncoderConfig | AbsoluteConfig) -> Encoder | AbsoluteEncoder:
    """The encoder that a configuration describes, its parameters not yet filled."""
    return Encoder(config) if isinstance(config, EncoderConfig) else AbsoluteEncoder(config)


def vjepa2_encoder(config: EncoderConfig | AbsoluteConfig) -> Layout:
    """V-JEPA 2's encoder, without the prefixes ``module.`` and ``backbone.``; V-JEPA 1's where positions are
    a table."""
    tensors = _tensors_of(config)
    reshaped = {"patch_embed.weight": _conv_shape(config)}
    if "positions" in tensors:
        reshaped["positions"] = (1, *tensors["positions"].shape)
    return _layout(tensors, _VJEPA2_ENCODER, "", reshaped)


def hf_encoder(config: EncoderConfig) -> Layout:
    """The encoder in ``transformers.VJEPA2Model``."""
    return _layout(_tensors_of(config), _HF_ENCODER, "encoder.", {"patch_embed.weight": _conv_shape(config)})


def vjepa2_predictor(predictor: nn.Module) -> Layout:
    """V-JEPA 2's predictor, without prefixes: a tensor for each mask token."""
    tensors = predictor.state_dict()
    count, width = tensors["mask_tokens"].shape
    words = {**_VJEPA2_PREDICTOR, "mask_tokens": tuple(f"mask_tokens.{number}" for number in range(count))}
    return _layout(tensors, words, "", {"mask_tokens": (1, 1, width)})


def hf_predictor(predictor: nn.Module) -> Layout:
    """The predictor in ``transformers.VJEPA2Model``."""
    tensors = predictor.state_dict()
    count, width = tensors["mask_tokens"].shape
    return _layout(tensors, _HF_PREDICTOR, "predictor.", {"mask_tokens": (count, 1, 1, width)})


def to_theirs(ours: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our tensors under their names, each with storage of its own."""
    theirs = {}
    for name, parts in layout.items():
        for (their_name, shape), part in zip(parts.items(), ours[name].chunk(len(parts)), strict=True):
            theirs[their_name] = part.reshape(shape).clone()
    return theirs


def to_ours(theirs: Mapping[str, Tensor], layout: Layout, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names; ``shapes`` holds ours."""
    return {
        name: torch.cat([theirs[part] for part in parts]).reshape(shapes[name].shape)
        for name, parts in layout.items()
    }


def shapes_of(layout: Layout) -> dict[str, Shape]:
    """Their names and shapes."""
    return {name: shape for parts in layout.values() for name, shape in parts.items()}


def require_fit(
    found: Mapping[str, Iterable[int]], expected: Mapping[str, Iterable[int]], where: str
) -> None:
    """Raises ValueError that names tensors which are missing, not expected, or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    problems += [
        f"{name}: got {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where}: {'; '.join(problems[:5])}{more}")


def _layout(ours: Mapping[str, Tensor], words: Words, prefix: str, reshaped: Mapping[str, Shape]) -> Layout:
    layout: Layout = {}
    for name, tensor in ours.items():
        theirs = _names(name, words, prefix)
        shape = reshaped[name] if name in reshaped else (tensor.shape[0] // len(theirs), *tensor.shape[1:])
        layout[name] = dict.fromkeys(theirs, shape)
    return layout


def _names(name: str, words: Words, prefix: str) -> list[str]:
    names = [""]
    for word in name.split("."):
        names = [f"{begun}.{theirs}" for begun in names for theirs in words.get(word, (word,))]
    return [prefix + theirs.removeprefix(".") for theirs in names]


def _tensors_of(config: EncoderConfig | AbsoluteConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return new_encoder(config).state_dict()


def _conv_shape(config: EncoderConfig | AbsoluteConfig) -> Shape:
    """Of V-JEPA 2's Conv3d, whose weight, flattened, is our patch embedding's."""
    return (config.width, 3, config.tubelet_size, config.patch_size, config.patch_size)
