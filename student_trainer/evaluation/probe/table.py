"""`salt-eval probe`: the accuracy of several frozen encoders on every label of a data set."""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from salt_distill.common.config import TIMM_RANDOM, EncoderConfig, FrozenConfig, ProbeConfig
from salt_distill.common.console import console
from salt_distill.common.draws import words
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.student_trainer.evaluation.probe.features import common_labels, labelled_samples
from salt_distill.student_trainer.evaluation.probe.judge import Exam, Judge, Verdict
from salt_distill.student_trainer.evaluation.probe.results import (
    TEST,
    TRAIN,
    VAL,
    protocol,
    reported_on,
    table,
    write,
)
from salt_distill.student_trainer.ranks import Worker

RANDOM_INIT = "random-init"


def run(config: ProbeConfig) -> None:
    """Judges every checkpoint, prints the table, writes the files."""
    started = time.monotonic()
    candidates = list_candidates(config)  # what is wrong with them is said before any worker starts
    exam, partial = open_exam(config)
    for name in partial:
        _say(f"label {name!r} is left out: not every clip of {config.data} carries it")
    if exam is None:
        write(config, {}, {}, "")
        _say(f"no probe: the clips of {config.data} carry no labels; {config.out} holds an empty table")
        return
    if exam.split == VAL:
        _say(f"{config.data} has no split 'test': accuracies are of 'val'")
    out = Path(config.out).resolve()
    state = out.with_name(f".{out.name}.training")
    if not config.resume:
        shutil.rmtree(state, ignore_errors=True)
    if config.workers == 0:
        torch.set_num_threads(config.num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        verdict = Judge(config, exam, state, Worker(rank=0, world_size=1, device=device), _say).all(
            candidates
        )
    else:
        from salt_distill.student_trainer.job import in_workers

        state.mkdir(parents=True, exist_ok=True)
        values = {"config": config.absolute().model_dump(mode="json"), "state": str(state)}
        said, verdict = in_workers(_judge_in_worker, values, config, folder=state)
        for sentence in said:
            _say(sentence)
    found = dict(
        zip((candidate.name for candidate in candidates), verdict.found.values(), strict=True)
    )  # workers know other paths
    write(config, found, verdict.facts, exam.split)
    shutil.rmtree(state, ignore_errors=True)
    caption = f"{protocol(config, exam.split)}; {time.monotonic() - started:.0f} s"
    Console().print(table(found, verdict.facts, split=exam.split, caption=caption))


def _judge_in_worker(worker: Worker, values: dict[str, Any]) -> tuple[list[str], Verdict]:
    """A worker's whole work, and what is to be said about it."""
    config = ProbeConfig.model_validate(values["config"])
    torch.set_num_threads(config.num_threads)
    exam, _ = open_exam(config)
    assert exam is not None, "without labels no worker starts"
    said: list[str] = []
    verdict = Judge(config, exam, Path(values["state"]), worker, said.append).all(list_candidates(config))
    return said, verdict


def open_exam(config: ProbeConfig) -> tuple[Exam | None, list[str]]:
    """What all encoders are asked, if the clips carry any label, and the labels that only some of them
    carry."""
    splits = labelled_samples(config.data)
    labels, partial = common_labels([sample for members in splits.values() for sample in members])
    if not labels:
        return None, partial
    num_settings = len(config.lr) * len(config.weight_decay)
    split = reported_on(list(splits), num_settings, config.data)
    needed = {TRAIN, split} | ({VAL} if num_settings > 1 else set())
    return (
        Exam(
            samples={name: splits[name] for name in (TRAIN, VAL, TEST) if name in needed},
            labels=labels,
            split=split,
        ),
        partial,
    )


def list_candidates(config: ProbeConfig) -> list[FrozenEncoder]:
    """What to judge, in the order given; ``random-init`` first."""
    candidates = open_candidates(config.ckpt, config.num_frames, config.crop_size, config.frame_step)
    return (
        [_with_fresh_weights(candidates[0], config.seed), *candidates] if config.random_init else candidates
    )


def open_candidates(
    paths: Sequence[str], num_frames: int | None, crop_size: int | None, frame_step: int | None
) -> list[FrozenEncoder]:
    """The encoders that these name, each once, on clips that are as asked for; named after their runs."""
    names = [checkpoint_name(path) for path in paths]
    names = [path if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"got --ckpt {', '.join(paths)}, expected every checkpoint once")
    candidates = []
    for path, name in zip(paths, names, strict=True):
        found = open_encoder(FrozenConfig(ckpt=path, num_frames=num_frames, crop_size=crop_size))
        view = found.view.model_copy(update={} if frame_step is None else {"frame_step": frame_step})
        candidates.append(dataclasses.replace(found, name=name, view=view))
    return candidates


def _with_fresh_weights(like: FrozenEncoder, seed: int) -> FrozenEncoder:
    """An encoder of the same architecture that has learned nothing."""
    architecture = like.config
    if not isinstance(architecture, EncoderConfig):
        raise ValueError(
            f"got --random-init with {like.name} first, expected a video ViT there: for timm's give --ckpt"
            f" {TIMM_RANDOM}NAME"
        )

    def load() -> nn.Module:
        encoder = Encoder(architecture)
        init_weights(
            encoder,
            torch.Generator().manual_seed(int(words(seed, RANDOM_INIT, 0, 1)[0] >> np.uint64(1))),
            std=like.init_std,
        )
        return encoder

    return dataclasses.replace(like, name=RANDOM_INIT, load=load)


def checkpoint_name(path: str) -> str:
    """A run directory's name; a checkpoint's with its run's in front."""
    resolved = Path(path.partition("?")[0]).resolve()  # an address may have options
    return (
        f"{resolved.parents[1].name}/{resolved.name}"
        if resolved.parent.name == "checkpoints"
        else resolved.name
    )


def _say(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
