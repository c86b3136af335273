"""A contact sheet: clips of a data set as the model sees them, and their masks."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from salt_distill.common.config import MASK_GROUP_SIZE, InspectConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.pictures import CONTEXT, DROPPED, TARGET, describe, strip, tint_masks, token_roles

_MARGIN = 12
_FONT_SIZE = 14
_INK, _PAPER = (29, 35, 39), (244, 244, 241)


def contact_sheet(config: InspectConfig) -> UInt8[np.ndarray, "h w 3"]:
    """The first clips of a run with this data seed, and the masks that it draws for the first of them in its
    first step."""
    reader = Reader(
        config.data,
        data_seed=config.data_seed,
        views="fresh",
        view=config.view,
        split=config.split,
        loader=config.loader,
    )
    batch = reader.clips(range(config.num_clips))
    reader.close()
    rows = []
    for place, key in enumerate(batch.keys):
        reason = "" if batch.good[place] else f": cannot be decoded ({reader.skipped[key]})"
        rows.append((f"{key}, view {batch.views[place]}{reason}", batch.pixels[place]))
    return _page(
        [
            (caption, strip(clip, config.encoder.tubelet_size))
            for caption, clip in [*rows, *_masked(config, batch.pixels[0])]
        ]
    )


def _masked(
    config: InspectConfig, clip: UInt8[np.ndarray, "t h w 3"]
) -> list[tuple[str, UInt8[np.ndarray, "t h w 3"]]]:
    """The first clip under each mask set, with a caption."""
    grid = token_grid(config.view, config.encoder)
    # A run's first step is 1. A whole group, since its smallest member decides how many tokens are dropped.
    group = mask_group(config.mask, grid, seed=config.seed, step=1, group=0, batch_size=MASK_GROUP_SIZE)
    rows = []
    for mask_set, mask in zip(config.mask.sets, group.sets, strict=True):
        roles = token_roles(mask, 0, grid.num_tokens)
        share = {role: (roles == role).mean() for role in (CONTEXT, TARGET, DROPPED)}
        caption = (
            f"masks of the first clip, {describe(mask_set)}: {share[CONTEXT]:.0%} seen, "
            f"{share[TARGET]:.0%} predicted (orange), {share[DROPPED]:.0%} dropped (grey)"
        )
        rows.append((caption, tint_masks(clip, roles, grid)))
    return rows


def _page(rows: list[tuple[str, UInt8[np.ndarray, "h w 4"]]]) -> UInt8[np.ndarray, "h w 3"]:
    """Captioned strips, one under the other."""
    font = ImageFont.load_default(_FONT_SIZE)
    width = (
        round(max(max(picture.shape[1], font.getlength(caption)) for caption, picture in rows)) + 2 * _MARGIN
    )
    height = sum(picture.shape[0] + _FONT_SIZE + 2 * _MARGIN for _, picture in rows) + _MARGIN
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    top = _MARGIN
    for caption, picture in rows:
        draw.text((_MARGIN, top), caption, fill=_INK, font=font)
        top += _FONT_SIZE + _MARGIN // 2
        opaque = Image.fromarray(picture)
        page.paste(opaque, (_MARGIN, top), opaque)
        top += picture.shape[0] + _MARGIN + _MARGIN // 2
    return np.asarray(page)
