"""Image encoders of timm as encoders of video: each frame by itself, on the student's token grid."""

import functools
from typing import Any

import timm
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from salt_distill.common.config import TIMM, TIMM_RANDOM, FrozenConfig, ViewConfig
from salt_distill.common.model.frozen import FrozenEncoder, TimmConfig
from salt_distill.common.model.grid import grid_of

PATCH_SIZE, TUBELET_SIZE = 16, 2
"""The paper's cube, of clips for an encoder that has none of its own."""


class TimmEncoder(nn.Module):
    """Clips to tokens by an image encoder (DESIGN section 4, Target).

    Frames are resized (bilinear, as all clips are) so that its patches lie on the grid of cubes of
    ``tubelet_size`` frames of ``patch_size`` pixels. Class and register tokens are dropped, and a token is
    the mean of its frames' tokens.
    """

    def __init__(self, model: Any, *, patch_size: int, tubelet_size: int) -> None:
        super().__init__()
        self.model = model
        self.stride: int = model.feature_info[-1]["reduction"]
        self.num_prefix_tokens: int = model.num_prefix_tokens
        self.patch_size, self.tubelet_size = patch_size, tubelet_size

    def forward(self, clip: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b n d"]:
        """Tokens of the whole clip, time-major."""
        grid = grid_of(clip, patch_size=self.patch_size, tubelet_size=self.tubelet_size)
        frames, size = (
            rearrange(clip, "b c t h w -> (b t) c h w"),
            (grid.h * self.stride, grid.w * self.stride),
        )
        if frames.shape[-2:] != size:
            frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
        tokens = self.model.forward_features(frames)[:, self.num_prefix_tokens :]
        if tokens.shape[1] != grid.h * grid.w:
            raise ValueError(
                f"got {tokens.shape[1]} tokens for a frame of {size} pixels, expected {grid.h} x {grid.w}:"
                " give another encoder"
            )
        return reduce(tokens, "(b t u) n d -> b (t n) d", "mean", b=len(clip), u=self.tubelet_size)


def open_timm(choice: FrozenConfig) -> FrozenEncoder:
    """The encoder that ``timm:NAME`` or ``timm-random:NAME`` means."""
    random = choice.ckpt.startswith(TIMM_RANDOM)
    name = choice.ckpt.removeprefix(TIMM_RANDOM if random else TIMM)
    model = _create(name, pretrained=False)  # to look at: weights come with load()
    config = TimmConfig(
        timm=name,
        width=model.num_features,
        num_heads=model.blocks[0].attn.num_heads,
        patch_size=choice.patch_size or PATCH_SIZE,
        tubelet_size=choice.tubelet_size or TUBELET_SIZE,
        norm_eps=None if isinstance(model.norm, nn.Identity) else model.norm.eps,
    )
    data = resolve_model_data_config(model)
    return FrozenEncoder(
        name=choice.ckpt,
        config=config,
        view=ViewConfig(),
        mean=data["mean"],
        std=data["std"],
        libraries={"timm": timm.__version__},
        load=functools.partial(_load, config, pretrained=not random),
    )


def _load(config: TimmConfig, *, pretrained: bool) -> TimmEncoder:
    model = _create(config.timm, pretrained=pretrained)
    model.reset_classifier(0, "")  # also drops an attention pool
    return TimmEncoder(model, patch_size=config.patch_size, tubelet_size=config.tubelet_size).eval()


def _create(name: str, *, pretrained: bool) -> Any:
    """A model of timm, whose classes share no type. Its random weights are the same each time. Raises
    ValueError where it is none that we can use."""
    if not timm.is_model(name):
        raise ValueError(
            f"got {TIMM}{name}, expected an architecture of timm {timm.__version__}: timm.list_models('vit*')"
            " lists some"
        )
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise ValueError(
            f"got {TIMM}{name}, expected a ViT, whose tokens form a grid at any size (dynamic_img_size):"
            f" {error}"
        ) from error
    except RuntimeError as error:  # an unknown tag, or none that has weights
        raise ValueError(f"got {TIMM}{name}: {error}") from error
    except OSError as error:
        raise ValueError(
            f"{TIMM}{name}: its weights cannot be had: {error} Put them into the cache of the Hugging Face"
            f" hub, or give {TIMM_RANDOM}{name} for random weights"
        ) from error
    if not hasattr(model, "num_prefix_tokens"):
        raise ValueError(
            f"got {TIMM}{name}, a {type(model).__name__}, expected a ViT, whose tokens form a grid at any"
            " size"
        )
    return model
