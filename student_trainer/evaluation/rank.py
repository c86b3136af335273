"""`salt-eval rank`: RankMe and k-NN accuracy of frozen encoders, from the mean of a clip's tokens. Nothing is
trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from salt_distill.common.config import ComputeDtype, LoaderConfig, RankConfig
from salt_distill.common.console import console
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.model.compute import uses_bfloat16
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.probe.features import (
    Clips,
    Frozen,
    common_labels,
    in_batches,
    labelled_samples,
)
from salt_distill.student_trainer.evaluation.probe.score import Score
from salt_distill.student_trainer.evaluation.probe.table import open_candidates

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
    learned = "train" in splits and config.split != "train"
    how: dict[str, Any] = {
        "data": config.data,
        "loader": config.loader,
        "batch_size": config.encode_batch_size,
        "dtype": config.dtype,
    }
    found = {}
    for candidate in open_candidates(config.ckpt, config.num_frames, config.crop_size, None):
        of_split, kept = pooled(candidate, splits[config.split], **how)
        if len(of_split) < candidate.config.width:
            raise ValueError(
                f"{candidate.name}: got {len(of_split)} clips of split {config.split!r} for"
                f" {candidate.config.width} channels, expected at least as many: RankMe of fewer is their"
                " number at most"
            )
        row: dict[str, Any] = {
            "rankme": rankme(of_split),
            "width": candidate.config.width,
            "num_clips": len(of_split),
        }
        if learned and labels:
            train, train_kept = pooled(candidate, splits["train"], **how)
            for label in labels:
                of_train, of_test = (_classes(samples, label) for samples in (train_kept, kept))
                classes = len(open_dataset(config.data).class_names[label])
                named = knn(train, of_train.to(train.device), of_split, num_classes=classes, k=config.k).cpu()
                score = Score(num_correct=int((named == of_test).sum()), num_clips=len(of_test))
                row.setdefault("knn", {})[label] = {"accuracy": score.accuracy, "interval": score.interval}
        found[candidate.name] = row
    _write(Path(config.out), {"protocol": _protocol(config), "encoders": found})
    Console().print(_table(found, _protocol(config)))


def pooled(
    candidate: FrozenEncoder,
    samples: Sequence[Sample],
    *,
    data: str,
    loader: LoaderConfig,
    batch_size: int,
    dtype: ComputeDtype,
) -> tuple[Float[Tensor, "b e"], list[Sample]]:
    """The mean of each clip's tokens, of the evaluation view; and the samples that have one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = Frozen(
        candidate, candidate.load(), device, batch_size=batch_size, bfloat16=uses_bfloat16(dtype, device)
    )
    reader = Reader(data, data_seed=0, views=1, view=candidate.view, split="all", loader=loader)
    clips = Clips(reader, samples, lambda sample, epoch: SegmentCut(candidate.view, 1, 1, 1.0))
    means, kept = [], []
    idx = in_batches(np.arange(len(samples)), batch_size)
    for rows, (good, pixels) in zip(idx, clips.batches(idx), strict=True):
        kept += [samples[row] for row in rows[good]]
        if good.any():
            means.append(frozen.tokens(pixels, 1).mean((1, 2)))
    for key, reason in reader.skipped.items():
        console.print(f"left out: {key}: {reason}", highlight=False, markup=False, soft_wrap=True)
    reader.close()
    return torch.cat(means), kept


def _classes(samples: list[Sample], label: str) -> Int[Tensor, " b"]:
    return torch.from_numpy(np.array([sample.labels[label] for sample in samples], np.int64))


def _protocol(config: RankConfig) -> str:
    return (
        f"mean of the tokens of one clip, {config.split!r}; RankMe uncentred, in float64; {config.k} nearest"
        " of 'train' by cosine"
    )


def _table(found: dict[str, Any], protocol: str) -> Table:
    labels = list(next(iter(found.values())).get("knn", {}))
    shown = Table(title="Without training anything", caption=protocol)
    shown.add_column("encoder")
    for name in ("RankMe", *(f"k-NN {label}" for label in labels)):
        shown.add_column(name, justify="right")
    for name, row in found.items():
        near = [
            f"{row['knn'][label]['accuracy']:.3f} "
            f" [dim]{'{:.3f}-{:.3f}'.format(*row['knn'][label]['interval'])}[/]"
            for label in labels
        ]
        shown.add_row(name, f"{row['rankme']:.1f} of {row['width']}", *near)
    return shown


def _write(out: Path, result: dict[str, Any]) -> None:
    write_whole(out, json.dumps(result, indent=2) + "\n")
