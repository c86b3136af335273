"""`salt-eval probe`: the accuracy of several frozen encoders on every label of a data set."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from common.command import console
from common.config import TIMM_RANDOM, EncoderConfig, FrozenConfig, ProbeConfig, ViewConfig
from common.data.shards import Sample, open_dataset
from common.draws import words
from common.model.checkpoint import open_encoder
from common.model.frozen import FrozenEncoder
from common.model.vit import Encoder, init_weights
from student_trainer.evaluation.features import LabelledClips, common_labels, frozen_tokens, labelled_samples, load_clips
from student_trainer.evaluation.probe import Score, score, train_probes

RANDOM_INIT = "random-init"
TRAIN, TEST = "train", "test"


def run(config: ProbeConfig) -> None:
    """Judges every checkpoint, prints the table, writes the JSON file."""
    torch.set_num_threads(config.num_threads)
    started = time.monotonic()
    candidates = list_candidates(config)
    splits = labelled_samples(config.data)
    labels, partial = common_labels([sample for members in splits.values() for sample in members])
    for name in partial:
        _say(f"label {name!r} is left out: not every clip of {config.data} carries it")
    if not labels:
        _write(config, {}, {})
        _say(f"no probe: the clips of {config.data} carry no labels; {config.out} holds an empty table")
        return
    for split in (TRAIN, TEST):
        if split not in splits:
            known = ", ".join(sorted(splits))
            raise ValueError(f"{config.data}: got splits {known}, expected {TRAIN!r} for the probe to learn on and {TEST!r} to score it on")
    scores, facts = _judge_all(config, candidates, {split: splits[split] for split in (TRAIN, TEST)}, labels)
    _write(config, scores, facts)
    Console().print(table(scores, facts, caption=f"{_protocol(config)}; {time.monotonic() - started:.0f} s"))


def list_candidates(config: ProbeConfig) -> list[FrozenEncoder]:
    """What to judge, in the order given; ``random-init`` first."""
    names = [_name(path) for path in config.ckpt]
    names = [path if names.count(name) > 1 else name for name, path in zip(names, config.ckpt, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"got --ckpt {', '.join(config.ckpt)}, expected every checkpoint once")
    choices = [FrozenConfig(ckpt=path, num_frames=config.num_frames, crop_size=config.crop_size) for path in config.ckpt]
    candidates = [dataclasses.replace(open_encoder(choice), name=name) for choice, name in zip(choices, names, strict=True)]
    return [_with_fresh_weights(candidates[0], config.seed), *candidates] if config.random_init else candidates


def _with_fresh_weights(like: FrozenEncoder, seed: int) -> FrozenEncoder:
    """An encoder of the same architecture that has learned nothing."""
    architecture = like.config
    if not isinstance(architecture, EncoderConfig):
        raise ValueError(f"got --random-init with {like.name} first, expected a video ViT there: for timm's give --ckpt {TIMM_RANDOM}NAME")

    def load() -> nn.Module:
        encoder = Encoder(architecture)
        init_weights(encoder, torch.Generator().manual_seed(int(words(seed, RANDOM_INIT, 0, 1)[0] >> np.uint64(1))), std=like.init_std)
        return encoder

    return dataclasses.replace(like, name=RANDOM_INIT, load=load)


def table(scores: dict[str, dict[str, Score]], facts: dict[str, dict[str, Any]], *, caption: str) -> Table:
    """Accuracy and 95% interval of each encoder on each label, and chance level."""
    shown = Table(title="Frozen-backbone probe, accuracy on the test split", caption=caption)
    shown.add_column("encoder")
    for label, fact in facts.items():
        shown.add_column(f"{label} ({fact['num_classes']} classes)", justify="right")
    for name, row in scores.items():
        shown.add_row(name, *(f"[bold]{row[label].accuracy:.3f}[/]  [dim]{_interval(row[label])}[/]" for label in facts))
    shown.add_section()
    shown.add_row("[dim]chance[/]", *(f"[dim]{fact['chance']:.3f}[/]" for fact in facts.values()))
    return shown


def _judge_all(
    config: ProbeConfig, candidates: Sequence[FrozenEncoder], samples: dict[str, list[Sample]], labels: Sequence[str]
) -> tuple[dict[str, dict[str, Score]], dict[str, dict[str, Any]]]:
    """Scores of every candidate on every label, and what the labels are."""
    class_names = open_dataset(config.data).class_names
    num_clips = sum(map(len, samples.values()))
    scores: dict[str, dict[str, Score]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("probing", total=len(candidates))
        for view, members in _by_view(candidates):
            for candidate in members:
                _check_memory(candidate, num_clips, config.max_feature_bytes)
            clips = {split: load_clips(config.data, chosen, view, config.loader, labels) for split, chosen in samples.items()}
            facts = {label: _label_facts(label, clips, class_names[label]) for label in labels}
            for split, loaded in clips.items():
                for key, reason in loaded.skipped.items():
                    _say(f"left out of split {split!r}: {key}: {reason}")
            for candidate in members:
                scores[candidate.name] = _judge(candidate, clips, {label: facts[label]["num_classes"] for label in labels}, config)
                progress.advance(task)
    return {candidate.name: scores[candidate.name] for candidate in candidates}, facts


def _judge(candidate: FrozenEncoder, clips: dict[str, LabelledClips], num_classes: dict[str, int], config: ProbeConfig) -> dict[str, Score]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = candidate.load()
    tokens = {
        split: frozen_tokens(
            encoder, loaded.pixels, mean=candidate.mean, std=candidate.std, batch_size=config.encode_batch_size, device=device
        )
        for split, loaded in clips.items()
    }
    classes: dict[str, dict[str, Tensor]] = {
        split: {label: torch.from_numpy(loaded.labels[label]).to(device) for label in num_classes} for split, loaded in clips.items()
    }
    probes = train_probes(
        tokens[TRAIN],
        classes[TRAIN],
        num_classes,
        num_heads=config.num_heads or candidate.config.num_heads,
        epochs=config.epochs,
        lr=config.lr,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    return {label: score(probe, tokens[TEST], classes[TEST][label], config.batch_size) for label, probe in probes.items()}


def _check_memory(candidate: FrozenEncoder, num_clips: int, max_bytes: int) -> None:
    clip_bytes = math.prod(candidate.view.clip_shape)
    token_bytes = candidate.grid.num_tokens * candidate.config.width * 4
    needed_bytes = num_clips * (clip_bytes + token_bytes)
    if needed_bytes > max_bytes:
        raise ValueError(
            f"{candidate.name}: got {num_clips} clips whose pixels and tokens take {needed_bytes / 1e9:.1f} GB, expected at most "
            f"{max_bytes / 1e9:.1f} GB: raise --max-feature-bytes, or pack fewer clips"
        )


def _by_view(candidates: Sequence[FrozenEncoder]) -> Iterator[tuple[ViewConfig, list[FrozenEncoder]]]:
    """Candidates that look at the same clips, together, so that these are decoded once."""
    views = {candidate.view.model_dump_json(): candidate.view for candidate in candidates}
    for text, view in views.items():
        yield view, [candidate for candidate in candidates if candidate.view.model_dump_json() == text]


def _label_facts(label: str, clips: dict[str, LabelledClips], class_names: list[str]) -> dict[str, Any]:
    train, test = clips[TRAIN].labels[label], clips[TEST].labels[label]
    return {
        "num_classes": len(class_names),
        "class_names": class_names,
        "chance": float((test == np.bincount(train).argmax()).mean()),  # always the training split's most common class
        "num_train": len(train),
        "num_test": len(test),
    }


def _write(config: ProbeConfig, scores: dict[str, dict[str, Score]], facts: dict[str, dict[str, Any]]) -> None:
    result = {
        "accuracy": {name: {label: value.accuracy for label, value in row.items()} for name, row in scores.items()},
        "interval": {name: {label: value.interval for label, value in row.items()} for name, row in scores.items()},
        "num_correct": {name: {label: value.num_correct for label, value in row.items()} for name, row in scores.items()},
        "labels": facts,
        "protocol": _protocol(config),
    }
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, out)


def _protocol(config: ProbeConfig) -> str:
    return (
        f"one cross-attention block, 1 clip x 1 view, {config.epochs} epochs of {config.batch_size} clips a step, lr {config.lr:g}, "
        f"weight decay {config.weight_decay:g}, last epoch, nothing selected"
    )


def _interval(value: Score) -> str:
    low, high = value.interval
    return f"{low:.3f}-{high:.3f}"


def _name(path: str) -> str:
    """A run directory's name; a checkpoint's with its run's in front."""
    resolved = Path(path.partition("?")[0]).resolve()  # an address may have options
    return f"{resolved.parents[1].name}/{resolved.name}" if resolved.parent.name == "checkpoints" else resolved.name


def _say(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
