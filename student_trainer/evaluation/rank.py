"""`salt-eval rank`: RankMe and k-NN accuracy of frozen encoders, from the mean of a clip's tokens. Nothing is
trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from salt_distill.common.config import ComputeDtype, LoaderConfig, RankConfig
from salt_distill.common.console import console, new_results
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.devices import device_here
from salt_distill.common.model.compute import uses_bfloat16
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.teacher import fingerprint
from salt_distill.student_trainer.evaluation.candidates import open_candidates
from salt_distill.student_trainer.evaluation.probe.features import (
    DecodedClips,
    EncoderOnDevice,
    common_labels,
    in_batches,
    labelled_samples,
)
from salt_distill.student_trainer.evaluation.probe.score import Score
from salt_distill.student_trainer.evaluation.records import EncoderIdentity, Record, index_hash

RANK_EPS = 1e-7
"""Added to each share of the singular values (Garrido et al. 2023, in float32)."""
KNN_TEMPERATURE = 0.07
"""Of the weights of neighbours, exp(cosine / temperature)."""


def rankme(features: Float[Tensor, "b e"]) -> float:
    """exp of the entropy of the singular values' shares, of features neither centred nor scaled: 1 for a
    line, at most the channels."""
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + RANK_EPS
    return float((-(shares * shares.log()).sum()).exp())


def knn(
    train: Float[Tensor, "b e"],
    train_label: Int[Tensor, " b"],
    test: Float[Tensor, "c e"],
    *,
    num_classes: int,
    k: int,
) -> Int[Tensor, " c"]:
    """The class with the most weight among the k nearest training clips by cosine."""
    similarity = torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    nearest, idx = similarity.topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(test), num_classes, dtype=similarity.dtype, device=test.device)
    votes.scatter_add_(1, train_label[idx], (nearest / KNN_TEMPERATURE).exp())
    return votes.argmax(1)


class NeighbourScore(Record):
    """Accuracy of naming clips by their nearest training clips."""

    accuracy: float
    interval: tuple[float, float]
    """95% Wilson interval."""


class RankedEncoder(Record):
    """What was found of an encoder."""

    identity: EncoderIdentity
    rankme: float
    """1 to ``width``."""
    width: int
    """Channels of its tokens."""
    num_clips: int
    knn: dict[str, NeighbourScore]
    """For each label; empty where there is nothing to learn from."""


class RankResults(Record):
    """``rank.json``."""

    writer: ClassVar[str] = "salt-eval rank"

    protocol: str
    split: str
    """Whose clips these are."""
    index_hash: str
    """Of the data set."""
    encoders: dict[str, RankedEncoder]


def run(config: RankConfig) -> None:
    """Judges every checkpoint, prints the table, writes the file."""
    torch.set_num_threads(config.num_threads)
    splits = labelled_samples(config.data)
    labels, _ = common_labels([sample for members in splits.values() for sample in members])
    if config.split not in splits:
        raise ValueError(
            f"{config.data}: got split {config.split!r}, expected one of {', '.join(sorted(splits))}: set"
            " --split"
        )
    can_learn = "train" in splits and config.split != "train"
    pool = partial(
        pooled,
        data=config.data,
        loader=config.loader,
        batch_size=config.encode_batch_size,
        dtype=config.dtype,
    )
    encoders = {}
    seed = config.seed if config.random_init else None
    for candidate in open_candidates(
        config.ckpt, config.num_frames, config.crop_size, None, random_seed=seed
    ):
        features = pool(candidate, splits[config.split])
        train = pool(candidate, splits["train"]) if can_learn and labels else None
        encoders[candidate.name] = _ranked(config, candidate, features, train, labels)
    results = RankResults(
        protocol=_protocol(config),
        split=config.split,
        index_hash=index_hash(config.data),
        encoders=encoders,
    )
    results.write(Path(config.out))
    new_results().print(_table(results))


def _ranked(
    config: RankConfig,
    candidate: FrozenEncoder,
    features: "PooledFeatures",
    train: "PooledFeatures | None",
    labels: Sequence[str],
) -> RankedEncoder:
    """An encoder's numbers. Raises ValueError where its clips are fewer than its channels."""
    num_clips, width = features.means.shape
    if num_clips < width:
        raise ValueError(
            f"{candidate.name}: got {num_clips} clips of split {config.split!r} for {width} channels,"
            " expected at least as many: RankMe of fewer is their number at most"
        )
    class_names = open_dataset(config.data).class_names
    scores = {}
    for label in labels:
        if train is None:
            break
        classes, test_classes = train.classes(label), features.classes(label)
        predicted = knn(
            train.means,
            classes.to(train.means.device),
            features.means,
            num_classes=len(class_names[label]),
            k=config.k,
        )
        score = Score(num_correct=int((predicted.cpu() == test_classes).sum()), num_clips=num_clips)
        scores[label] = NeighbourScore(accuracy=score.accuracy, interval=score.interval)
    return RankedEncoder(
        identity=EncoderIdentity.of(candidate, features.fingerprint),
        rankme=rankme(features.means),
        width=width,
        num_clips=num_clips,
        knn=scores,
    )


@dataclass(frozen=True, kw_only=True)
class PooledFeatures:
    """The mean of each clip's tokens."""

    means: Float[Tensor, "b e"]
    samples: Sequence[Sample]
    """Those that could be decoded, a row each."""
    fingerprint: str
    """Of the encoder."""

    def classes(self, label: str) -> Int[Tensor, " b"]:
        """The class numbers of a label."""
        return torch.from_numpy(np.array([sample.labels[label] for sample in self.samples], np.int64))


def pooled(
    candidate: FrozenEncoder,
    samples: Sequence[Sample],
    *,
    data: str,
    loader: LoaderConfig,
    batch_size: int,
    dtype: ComputeDtype,
) -> PooledFeatures:
    """The features of the evaluation view, of the samples that can be decoded; the others are named."""
    device = device_here()
    module = candidate.load()
    encoder = EncoderOnDevice(
        candidate, module, device, batch_size=batch_size, bfloat16=uses_bfloat16(dtype, device)
    )
    reader = Reader(data, data_seed=0, views=1, view=candidate.view, split="all", loader=loader)
    clips = DecodedClips(reader, samples, lambda sample, epoch: SegmentCut(candidate.view, 1, 1, 1.0))
    means, good_samples = [], []
    idx = in_batches(np.arange(len(samples)), batch_size)
    for rows, (good, pixels) in zip(idx, clips.batches(idx), strict=True):
        good_samples += [samples[row] for row in rows[good]]
        if good.any():
            means.append(encoder.tokens(pixels, 1).mean((1, 2)))
    for key, reason in reader.skipped.items():
        console.print(f"left out: {key}: {reason}", highlight=False, markup=False, soft_wrap=True)
    reader.close()
    return PooledFeatures(
        means=torch.cat(means), samples=good_samples, fingerprint=fingerprint(candidate, module)
    )


def _protocol(config: RankConfig) -> str:
    return (
        f"mean of the tokens of one clip, {config.split!r}; RankMe uncentred, in float64; {config.k} nearest"
        " of 'train' by cosine"
    )


def _table(results: RankResults) -> Table:
    labels = list(next(iter(results.encoders.values())).knn)
    table = Table(title="Without training anything", caption=results.protocol)
    table.add_column("encoder")
    for name in ("RankMe", *(f"k-NN {label}" for label in labels)):
        table.add_column(name, justify="right")
    for name, row in results.encoders.items():
        near = [
            f"{row.knn[label].accuracy:.3f}  [dim]{'{:.3f}-{:.3f}'.format(*row.knn[label].interval)}[/]"
            for label in labels
        ]
        table.add_row(name, f"{row.rankme:.1f} of {row.width}", *near)
    return table
