"""What a probe takes of each video: where it is scored, and where it learns."""

from salt_distill.common.config import ProbeConfig, ViewConfig
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.data.views import draw
from salt_distill.common.draws import words
from salt_distill.student_trainer.evaluation.probe.augment import AugmentedVideoCut, ImageCut
from salt_distill.student_trainer.evaluation.probe.results import TRAIN


def cuts(config: ProbeConfig, view: ViewConfig, split: str, *, num_views: int) -> SegmentCut | None:
    """What is taken of every video of a split; None where that is drawn anew for each of them."""
    if split == TRAIN and config.augment:
        return None
    kind = ImageCut if config.augment_with == "images" else SegmentCut
    return kind(view, config.segments, 1 if split == TRAIN else num_views, config.square)


def drawn(config: ProbeConfig, view: ViewConfig, sample: Sample, epoch: int) -> SegmentCut:
    """What is taken of a training video in an epoch: V-JEPA's crops, one for each segment, without a flip but
    for images, and what else the protocol does to clips."""
    view = view.model_copy(update={"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "flip": False})
    names = [f"probe {number} {sample.key}" for number in range(config.segments)]
    draws = tuple(draw(config.seed, name, epoch) for name in names)
    if config.augment_with == "crops":
        return SegmentCut(view, config.segments, 1, 1.0, draws)
    seeds = tuple(int(words(config.seed, f"{name} change", epoch, 1)[0]) for name in names)
    if config.augment_with == "images":
        return ImageCut(view, config.segments, 1, 1.0, draws, seeds[0])
    return AugmentedVideoCut(view, config.segments, 1, 1.0, draws, seeds)
