"""Oracles of the random resized crop."""

from functools import cache

from salt_distill.common.config import ViewConfig
from salt_distill.common.data.views import crop_box, draw
from salt_distill.student_trainer.evaluation.fidelity.oracle import VJEPA2, Oracle, exact, near

NUM_DRAWS = 20_000
FRAMES = {"16:9": (240, 426), "4:3": (240, 320), "1:1": (240, 240)}
"""Height and width."""
FILLING = {"16:9": 2.4, "4:3": 1.4, "1:1": 1.3}
"""Percent of the crops that are as long as the frame's shorter side."""
BOXES = {
    "16:9": [(7, 180, 229, 229), (2, 29, 203, 158), (1, 62, 224, 237), (0, 124, 238, 290)],
    "1:1": [(41, 63, 172, 172), (4, 13, 152, 119), (4, 20, 168, 178), (20, 20, 179, 218)],
}
"""Top, left, height and width from the draws of samples 0 to 3, given to the reference's function."""


def crops() -> list[Oracle]:
    """Table 5's scale and ratio in frames of three shapes."""
    filling = [
        near(
            f"{shape}: crops that fill the shorter side, %",
            VJEPA2,
            percent,
            lambda shape=shape: 100 * _statistics(shape)[0],
            within=0.4,
            digits=1,
        )
        for shape, percent in FILLING.items()
    ]
    area = near("16:9: mean share of the frame", VJEPA2, 0.458, lambda: _statistics("16:9")[1], within=0.004)
    boxes = [
        exact(f"{shape}: boxes from equal draws", VJEPA2, expected, lambda shape=shape: _boxes(shape, 4))
        for shape, expected in BOXES.items()
    ]
    return [*filling, area, *boxes]


def _boxes(shape: str, num_draws: int) -> list[tuple[int, int, int, int]]:
    return [
        crop_box(ViewConfig(), *FRAMES[shape], draw(0, f"fidelity {number}", 0))
        for number in range(num_draws)
    ]


@cache
def _statistics(shape: str) -> tuple[float, float]:
    """The share of crops that fill the shorter side, which is the height, and the mean share of the area."""
    height, width = FRAMES[shape]
    boxes = _boxes(shape, NUM_DRAWS)
    filling = sum(crop_h == height or (height == width and crop_w == width) for _, _, crop_h, crop_w in boxes)
    area = sum(crop_h * crop_w for _, _, crop_h, crop_w in boxes)
    return filling / NUM_DRAWS, area / (NUM_DRAWS * height * width)
