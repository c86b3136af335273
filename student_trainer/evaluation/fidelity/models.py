"""Oracles of the models: widths, weights, rotary positions, what they are at the start."""

from functools import cache

import torch
import torch.nn.functional as F

from salt_distill.common.config import EncoderConfig, FlopsConfig, MaskConfig, PredictorConfig, preset_layer
from salt_distill.common.model.flops import encoder_parameters, predictor_parameters
from salt_distill.common.model.grid import TokenGrid, token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.rope import rope_table, rotate
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.student_trainer.evaluation.fidelity.oracle import (
    PAPER,
    VJEPA2,
    Oracle,
    exact,
    near,
    printed,
)
from salt_distill.student_trainer.salt import Salt
from salt_distill.student_trainer.vpixel import VPixel, pixel_width

SHAPES = {
    "vit-b": (768, 12, 12),
    "vit-l": (1024, 24, 16),
    "vit-h": (1280, 32, 16),
    "vit-g": (1408, 40, 16),
    "vit-G": (1664, 48, 16),
}
"""Width, depth and heads of Table 3."""
ENCODER_WEIGHTS = {
    "vit-b": ("86", "86.236"),
    "vit-l": ("303", "303.885"),
    "vit-h": ("632", "631.648"),
    "vit-g": ("1012", "1012.174"),
}
"""Millions: Table 3, and V-JEPA 2's code."""
PREDICTOR_WEIGHTS = {
    "vit-b": (768, "21.88", 21_886_080),
    "vit-l": (1024, "22.08", 22_082_944),
    "vit-h": (1024, "22.18", 22_181_248),
    "vit-g": (1024, "22.23", 22_230_400),
    "vit-G": (1024, "22.32", 22_328_704),
}
"""Output width and millions of Table 4; V-JEPA 2's code with two mask tokens."""

AXES = {
    64: (20, 20, 20, 4),
    80: (26, 26, 26, 2),
    88: (28, 28, 28, 4),
    104: (34, 34, 34, 2),
    32: (10, 10, 10, 2),
    24: (8, 8, 8, 0),
}
"""Channels of a head of this width that turn with time, height and width, and those that do not turn."""
ROTATED = {
    "vjepa2_tiled": "-0.01411 0.03676 0.04049 0.33227 0.36122 0.51177 0.5916 0.70284 0.7983 0.9006 "
    "-1.14522 1.33438 0.47181 1.50257 1.2831 1.54132 1.57958 1.70759 1.7964 1.90136",
    "interleaved": "-0.01411 -0.099 -0.20546 0.29629 0.12675 0.62764 0.45757 0.80039 0.72997 0.95767 "
    "0.96655 1.1295 1.18439 1.31424 1.39285 1.50664 1.59678 1.70303 1.79857 1.90136",
}
"""20 channels 0, 0.1 ... 1.9 at position 3."""


def encoder_of(preset: str) -> EncoderConfig:
    """The encoder of a preset."""
    return FlopsConfig.model_validate(preset_layer(FlopsConfig, preset)).encoder


def encoders() -> list[Oracle]:
    """Table 3."""
    oracles = []
    for preset, shape in SHAPES.items():
        encoder = encoder_of(preset)
        sizes = (encoder.width, encoder.depth, encoder.num_heads)
        oracles.append(
            exact(f"{preset}: width, depth, heads", f"{PAPER}, Table 3", shape, lambda sizes=sizes: sizes)
        )
    for preset, (table, code) in ENCODER_WEIGHTS.items():
        for source, expected in ((f"{PAPER}, Table 3", table), (VJEPA2, code)):
            oracles.append(
                printed(
                    f"{preset}: weights",
                    source,
                    expected,
                    lambda preset=preset: _weights(preset) / 1e6,
                    unit="M",
                )
            )
    wide, narrow = encoder_of("vit-G"), encoder_of("vit-G").model_copy(update={"mlp_width": 4 * 1664})
    return [
        *oracles,
        printed(
            "vit-G: weights", f"{PAPER}, Table 3", "1.843", lambda: encoder_parameters(wide) / 1e9, unit="B"
        ),
        exact("vit-G: weights, MLP of 8192", "by hand", 1_843_923_840, lambda: encoder_parameters(wide)),
        printed(
            "vit-G with an MLP of 6656: weights",
            VJEPA2,
            "1.598",
            lambda: encoder_parameters(narrow) / 1e9,
            unit="B",
        ),
        exact(
            "tokens of 16 frames at 224, at 256",
            VJEPA2,
            (1568, 2048),
            lambda: tuple(_num_tokens(size) for size in (224, 256)),
        ),
    ]


def predictors() -> list[Oracle]:
    """Table 4."""
    config = PredictorConfig()
    oracles = [
        exact(
            "width, depth, heads",
            f"{PAPER}, Table 4",
            (384, 12, 16),
            lambda: (config.width, config.depth, config.num_heads),
        )
    ]
    for preset, (out_width, table, code) in PREDICTOR_WEIGHTS.items():
        in_width = encoder_of(preset).width
        name = f"{in_width} to {out_width}: weights"
        number = _predictor_weights(in_width, out_width)
        oracles += [
            printed(name, f"{PAPER}, Table 4", table, lambda number=number: number / 1e6, unit="M"),
            exact(f"{name}, two mask tokens", VJEPA2, code, lambda number=number: number),
        ]
    return [
        *oracles,
        exact(
            "V-Pixel, 1024 to 1536: weights, two mask tokens",
            "by hand",
            22_280_064,
            lambda: _predictor_weights(1024, pixel_width(EncoderConfig())),
        ),
        exact("values of a cube of pixels", "VideoMAE's code", 1536, lambda: pixel_width(EncoderConfig())),
    ]


def rope() -> list[Oracle]:
    """How a head is split among the axes, and what turning does."""
    oracles = [
        exact(
            f"head of {width}: channels of time, height, width, none",
            VJEPA2,
            expected,
            lambda width=width: _axes(width),
        )
        for width, expected in AXES.items()
    ]
    for style, text in ROTATED.items():
        for axis, name in enumerate(("time", "height", "width")):
            oracles.append(
                near(
                    f"{style}: 0, 0.1 ... 1.9 at position 3 in {name}",
                    VJEPA2,
                    [float(value) for value in text.split()],
                    lambda style=style, axis=axis: _turned(style, axis),
                    within=1e-5,
                    digits=3,
                )
            )
    return oracles


def initial() -> list[Oracle]:
    """Freshly initialised models, and what they predict."""
    return [
        near(
            "deviation of the maps that end blocks 1, 2, 3",
            VJEPA2,
            (0.0142, 0.0099, 0.0081),
            _depth_rescale,
            within=0.03,
            relative=True,
            digits=4,
        ),
        near(
            "ViT-B: deviation of what SALT predicts",
            VJEPA2,
            0.39,
            lambda: _at_start()["deviation"],
            within=0.01,
            digits=2,
        ),
        near(
            "ViT-B: SALT's loss, targets layer-normalised",
            VJEPA2,
            0.857,
            lambda: _at_start()["salt"],
            within=0.01,
            digits=2,
        ),
        near(
            "ViT-B: V-Pixel's loss (1.0 to 1.15)",
            VJEPA2,
            1.15,
            lambda: _at_start()["vpixel"],
            within=0.01,
            digits=2,
        ),
    ]


def _weights(preset: str) -> int:
    return encoder_parameters(encoder_of(preset))


def _predictor_weights(in_width: int, out_width: int) -> int:
    return predictor_parameters(PredictorConfig(), in_width=in_width, out_width=out_width, num_mask_tokens=2)


def _num_tokens(crop_size: int) -> int:
    config = FlopsConfig()
    return token_grid(config.view.model_copy(update={"crop_size": crop_size}), config.encoder).num_tokens


def _axes(head_width: int) -> tuple[int, ...]:
    """Channels that turn where one axis alone has a second position, then those that never do."""
    turns = []
    for axis in range(3):
        grid = TokenGrid(*(2 if other == axis else 1 for other in range(3)))
        table = rope_table(grid, head_width, "interleaved", torch.device("cpu"))
        turns.append(int((table[1, 1] != 0).sum()))
    return (*turns, head_width - sum(turns))


def _turned(style: str, axis: int) -> list[float]:
    grid = TokenGrid(*(4 if other == axis else 1 for other in range(3)))
    channels = slice(20 * axis, 20 * axis + 20)
    x = torch.zeros(64)
    x[channels] = torch.arange(20) / 10
    return rotate(x[None], rope_table(grid, 64, style, torch.device("cpu"))[:, [3]])[0, channels].tolist()


@cache
def _depth_rescale() -> tuple[float, ...]:
    encoder = Encoder(EncoderConfig(width=192, depth=3, num_heads=4, mlp_width=768))
    init_weights(encoder, torch.Generator().manual_seed(0), std=0.02)
    return tuple(block.mlp.w_down.weight.std().item() for block in encoder.blocks)  # type: ignore[union-attr]


@cache
def _at_start() -> dict[str, float]:
    """ViT-B on one clip of noise, 112 pixels wide so that it takes seconds: what it predicts does not depend
    on the number of tokens."""
    generator = torch.Generator().manual_seed(0)
    config = encoder_of("vit-b")
    grid = TokenGrid(8, 7, 7)
    encoder = Encoder(config)
    init_weights(encoder, generator, std=0.02)
    heads = []
    for out_width in (config.width, pixel_width(config)):
        predictor = Predictor(
            PredictorConfig(),
            in_width=config.width,
            out_width=out_width,
            num_mask_tokens=2,
            rope=config.rope,
            norm_eps=config.norm_eps,
        )
        predictor.init_weights(generator, std=0.02)
        heads.append(predictor)
    pixels = torch.randint(0, 256, (1, 16, 112, 112, 3), dtype=torch.uint8, generator=generator)
    masks = mask_group(MaskConfig(), grid, seed=0, step=0, group=0, batch_size=1)
    short = masks.sets[0]
    with torch.inference_mode():
        clip = normalise(pixels)
        target = F.layer_norm(encoder(clip), (config.width,), eps=1e-5)
        predicted = heads[0](
            encoder(clip, short.visible_idx), short.visible_idx, short.hidden_idx, grid=grid, mask_set=0
        )
        return {
            "deviation": float(predicted.std()),
            "salt": float(Salt(encoder, heads[0])(pixels, masks, target).mean()),
            "vpixel": float(VPixel(encoder, heads[1], pixel_norm="channel")(pixels, masks).mean()),
        }
