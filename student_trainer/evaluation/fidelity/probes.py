"""Oracles of the probes: their training clips, optimizer and first weights."""

from functools import cache

import numpy as np
import torch

from salt_distill.common.config import PROTOCOLS
from salt_distill.student_trainer.evaluation.fidelity.oracle import VJEPA2, Oracle, exact, near
from salt_distill.student_trainer.evaluation.probe.attentive import AttentiveProbe
from salt_distill.student_trainer.evaluation.probe.augment import erase, rand_augment
from salt_distill.student_trainer.evaluation.probe.probe_grid import ProbeSetting, rates

VJEPA = "V-JEPA's code"
"""facebookresearch/jepa at 51c59d5, read and run on a CPU."""


def probes() -> list[Oracle]:
    """What a probe learns from, and how."""
    setting = ProbeSetting(lr=1e-3, weight_decay=0.01)
    return [
        exact(
            "RandAugment m7-n4-mstd0.5-inc1: sum of the pixels of one image under seeds 0 to 39",
            VJEPA2,
            41_766_114,
            _rand_augment_sum,
        ),
        near("clips with an erased rectangle", VJEPA2, 0.25, lambda: _erased()[0], within=0.03, digits=2),
        near("mean share of the rectangle", VJEPA2, 0.1766, lambda: _erased()[1], within=0.01),
        near(
            "learning rate at updates 1, 50, 100 of 100, of 1e-3, / 1e-4",
            VJEPA2,
            (9.99753, 5.0, 0.0),
            lambda: [1e4 * rates("vjepa2", setting, update / 100)[0] for update in (1, 50, 100)],
            within=1e-4,
            digits=4,
        ),
        near(
            "decay of the fast forms at updates 1, 50, 100 of 100, of 0.01",
            VJEPA,
            (0.00999753, 0.0050005, 1e-6),
            lambda: [rates("vjepa", setting, update / 100)[1] for update in (1, 50, 100)],
            within=1e-7,
            digits=6,
        ),
        near(
            "depth 4: maps that end blocks 1, 2, 3 and the cross-attention block, of the others' deviation",
            VJEPA2,
            (0.708, 0.5, 0.408, 0.408),
            lambda: _final_maps(4),
            within=0.01,
            relative=True,
            digits=3,
        ),
        near(
            "depth 1: the map that ends it",
            VJEPA2,
            0.707,
            lambda: _final_maps(1)[0],
            within=0.01,
            relative=True,
            digits=4,
        ),
        exact(
            "RandAugment and erasing: presets with videos",
            VJEPA2,
            tuple(name for name in PROTOCOLS if not name.startswith("in1k")),
            lambda: tuple(name for name, values in PROTOCOLS.items() if values["augment_with"] == "video"),
        ),
    ]


def _rand_augment_sum() -> int:
    row, column = np.mgrid[0:48, 0:64]
    image = np.stack([4 * column, 5 * row, row * column % 256], -1).astype(np.uint8)
    return sum(int(rand_augment([image], seed)[0].sum()) for seed in range(40))


@cache
def _erased() -> tuple[float, float]:
    """Share of clips that have a rectangle, and its mean share of the clip."""
    areas = []
    for seed in range(2000):
        clip = np.full((1, 64, 64, 3), 7, np.uint8)
        erase(clip, seed)
        rows, columns = np.where((clip != 7).any(-1)[0])
        if len(rows):
            areas.append((np.ptp(rows) + 1) * (np.ptp(columns) + 1) / 64**2)
    return len(areas) / 2000, float(np.mean(areas))


@cache
def _final_maps(depth: int) -> list[float]:
    probe = AttentiveProbe(256, 4, 10, depth).requires_grad_(False)
    probe.init_weights(torch.Generator().manual_seed(0))
    blocks = [block.get_parameter("linear2.weight") for block in probe.blocks]
    deviation = probe.w_up.weight.std()
    return [float(weight.std() / deviation) for weight in (*blocks, probe.w_down.weight)]
