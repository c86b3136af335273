"""`salt-eval probe`: the accuracy of several frozen encoders on every label of a data set."""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from rich.console import Console
from rich.progress import Progress
from torch import nn

from common.command import console
from common.config import TIMM_RANDOM, EncoderConfig, FrozenConfig, ProbeConfig, ViewConfig
from common.data.reader import Reader
from common.data.sample import Sample
from common.data.segments import SegmentCut
from common.data.shards import open_dataset
from common.data.views import draw
from common.draws import words
from common.model.checkpoint import open_encoder
from common.model.compute import uses_bfloat16
from common.model.frozen import FrozenEncoder
from common.model.teacher import device_kind, fingerprint
from common.model.vit import Encoder, init_weights
from student_trainer.evaluation.feature_files import FileTokens, feature_path, write_features
from student_trainer.evaluation.features import Clips, FreshTokens, Frozen, KeptTokens, Tokens, common_labels, in_batches, labelled_samples
from student_trainer.evaluation.probe_results import TRAIN, VAL, Found, protocol, reported_on, table, write
from student_trainer.evaluation.probe_training import ProbeGrid, Setting
from student_trainer.evaluation.score import score_of

RANDOM_INIT = "random-init"
_OF_THE_COMMAND = {"ckpt", "out", "random_init", "features", "max_feature_bytes", "resume", "num_threads", "loader"}
"""Fields of the configuration that do not change a probe."""


def run(config: ProbeConfig) -> None:
    """Judges every checkpoint, prints the table, writes the files."""
    torch.set_num_threads(config.num_threads)
    started = time.monotonic()
    candidates = list_candidates(config)
    splits = labelled_samples(config.data)
    labels, partial = common_labels([sample for members in splits.values() for sample in members])
    for name in partial:
        _say(f"label {name!r} is left out: not every clip of {config.data} carries it")
    if not labels:
        write(config, {}, {}, "")
        _say(f"no probe: the clips of {config.data} carry no labels; {config.out} holds an empty table")
        return
    split = reported_on(list(splits), len(config.lr) * len(config.weight_decay), config.data)
    if split == VAL:
        _say(f"{config.data} has no split 'test': accuracies are of 'val'")
    choosing = {VAL} if len(config.lr) * len(config.weight_decay) > 1 else set()
    judge = Judge(config, {name: splits[name] for name in (TRAIN, VAL, "test") if name in {TRAIN, split, *choosing}}, labels, split)
    results = judge.all(candidates)
    write(config, results, judge.facts, split)
    shutil.rmtree(judge.state, ignore_errors=True)
    Console().print(table(results, judge.facts, split=split, caption=f"{protocol(config, split)}; {time.monotonic() - started:.0f} s"))


def list_candidates(config: ProbeConfig) -> list[FrozenEncoder]:
    """What to judge, in the order given; ``random-init`` first."""
    candidates = open_candidates(config.ckpt, config.num_frames, config.crop_size, config.frame_step)
    return [_with_fresh_weights(candidates[0], config.seed), *candidates] if config.random_init else candidates


def open_candidates(paths: Sequence[str], num_frames: int | None, crop_size: int | None, frame_step: int | None) -> list[FrozenEncoder]:
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
        raise ValueError(f"got --random-init with {like.name} first, expected a video ViT there: for timm's give --ckpt {TIMM_RANDOM}NAME")

    def load() -> nn.Module:
        encoder = Encoder(architecture)
        init_weights(encoder, torch.Generator().manual_seed(int(words(seed, RANDOM_INIT, 0, 1)[0] >> np.uint64(1))), std=like.init_std)
        return encoder

    return dataclasses.replace(like, name=RANDOM_INIT, load=load)


def cuts(config: ProbeConfig, view: ViewConfig, split: str, *, num_views: int) -> SegmentCut | None:
    """What is taken of every video of a split; None where that is drawn anew for each of them."""
    if split == TRAIN and config.augment:
        return None
    return SegmentCut(view, config.segments, 1 if split == TRAIN else num_views, config.square)


def drawn(config: ProbeConfig, view: ViewConfig, sample: Sample, epoch: int) -> SegmentCut:
    """What is taken of a training video in an epoch: V-JEPA's crops, without a flip, one for each segment."""
    view = view.model_copy(update={"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "flip": False})
    draws = tuple(draw(config.seed, f"probe {number} {sample.key}", epoch) for number in range(config.segments))
    return SegmentCut(view, config.segments, 1, 1.0, draws)


class Judge:
    """Every encoder, one after the other, on the same labelled clips."""

    def __init__(self, config: ProbeConfig, samples: Mapping[str, Sequence[Sample]], labels: Sequence[str], split: str) -> None:
        """``split``: whose accuracy is reported; where there are several settings, ``samples`` has VAL as well."""
        dataset = open_dataset(config.data)
        self.facts: dict[str, dict[str, Any]] = {}
        """What each label is."""
        self.state = Path(config.out).with_name(f".{Path(config.out).name}.training")
        """Folder of what ``--resume`` goes on from."""
        self._config, self._samples, self._split = config, samples, split
        self._class_names = {label: dataset.class_names[label] for label in labels}
        self._index_hash = dataset.index_hash
        self._settings = [Setting(lr, decay) for lr in config.lr for decay in config.weight_decay]
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bfloat16 = uses_bfloat16(config.dtype, self._device)

    def all(self, candidates: Sequence[FrozenEncoder]) -> dict[str, dict[str, Found]]:
        """For each encoder and label what was found."""
        if not self._config.resume:
            shutil.rmtree(self.state, ignore_errors=True)
        results: dict[str, dict[str, Found]] = {}
        numbers = {candidate.name: number for number, candidate in enumerate(candidates)}
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("probing", total=len(candidates))
            for view, members in _by_view(candidates):
                reader = Reader(self._config.data, data_seed=0, views=1, view=view, split="all", loader=self._config.loader)
                clips = {split: self._clips(reader, view, split) for split in self._samples}
                decoded = self._decoded(clips, members)
                for candidate in members:
                    module = candidate.load()
                    identity = self._identity(candidate, module)
                    frozen = Frozen(candidate, module, self._device, batch_size=self._config.encode_batch_size, bfloat16=self._bfloat16)
                    tokens = {
                        split: self._tokens(split, clips[split], frozen, decoded, identity | {"decoder": reader.decoder}) for split in clips
                    }
                    results[candidate.name] = self._judge(candidate, tokens, self.state / f"{numbers[candidate.name]}.pt", identity)
                    progress.advance(task)
                for key, reason in reader.skipped.items():
                    _say(f"left out: {key}: {reason}")
                reader.close()
        return {candidate.name: results[candidate.name] for candidate in candidates}

    def _clips(self, reader: Reader, view: ViewConfig, split: str) -> Clips:
        fixed = cuts(self._config, view, split, num_views=self._config.views)
        return Clips(reader, self._samples[split], lambda sample, epoch: fixed or drawn(self._config, view, sample, epoch))

    def _decoded(self, clips: Mapping[str, Clips], members: Sequence[FrozenEncoder]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """Every clip, where all of them stay in memory: several encoders look at them."""
        if self._config.augment or self._config.features is not None:
            return {}
        for candidate in members:
            _check_memory(candidate, clips, self._config.max_feature_bytes)
        return {split: list(of.batches(in_batches(len(of.samples), self._config.encode_batch_size))) for split, of in clips.items()}

    def _tokens(
        self,
        split: str,
        clips: Clips,
        frozen: Frozen,
        decoded: Mapping[str, list[tuple[Bool[np.ndarray, " b"], np.ndarray]]],
        identity: Mapping[str, Any],
    ) -> Tokens:
        """From where the configuration says."""
        cut = clips.cut(clips.samples[0], 0)
        if self._config.augment:
            return FreshTokens(frozen, clips)
        if self._config.features is None:
            kept = np.concatenate([good for good, _ in decoded[split]])
            return KeptTokens(kept, torch.cat([frozen.tokens(pixels, cut.num_views) for _, pixels in decoded[split] if len(pixels)]))
        facts = {
            "fingerprint": identity["fingerprint"],
            "index_hash": identity["index_hash"],
            "decoder": identity["decoder"],
            "compute": identity["compute"],
            "split": split,
            "view": cut.view.model_dump(mode="json"),
            "clips": [cut.num_segments, cut.num_views, cut.square],
        }
        path = feature_path(self._config.features, facts)
        if not path.exists():
            write_features(path, facts, frozen, clips, self._config.encode_batch_size)
        found = FileTokens(path, [sample.key for sample in clips.samples], self._device)
        if not found.kept.all():
            _say(f"{path}: {(~found.kept).sum()} clips of {split!r} are not there: they could not be decoded when it was written")
        return found

    def _judge(self, candidate: FrozenEncoder, tokens: Mapping[str, Tokens], state: Path, identity: Mapping[str, Any]) -> dict[str, Found]:
        config = self._config
        labels = {split: self._labels(split, of.kept) for split, of in tokens.items()}
        self.facts = {label: self._label_facts(label, labels) for label in self._class_names}
        grid = ProbeGrid(
            {label: len(names) for label, names in self._class_names.items()},
            self._settings,
            width=candidate.config.width,
            num_heads=config.num_heads or candidate.config.num_heads,
            depth=config.depth,
            epochs=config.epochs,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            device=self._device,
            bfloat16=self._bfloat16,
        )
        if config.resume and state.exists():
            grid.load(state, dict(identity))
        while grid.epoch < config.epochs:
            grid.train_epoch(tokens[TRAIN], labels[TRAIN])
            grid.save(state, dict(identity))
        size = config.micro_batch_size or config.batch_size
        reported = grid.confusions(tokens[self._split], labels[self._split], size)
        if len(self._settings) == 1:
            return {label: Found(setting=setting, chosen_by=None, counts=counts) for (label, setting), counts in reported.items()}
        by_val = reported if self._split == VAL else grid.confusions(tokens[VAL], labels[VAL], size)
        scores = {name: score_of(counts) for name, counts in by_val.items()}
        found = {}
        for label in self._class_names:
            best = max(self._settings, key=lambda setting: scores[label, setting].num_correct)  # the first of the grid, of equals
            found[label] = Found(setting=best, chosen_by=scores[label, best], counts=reported[label, best])
        return found

    def _labels(self, split: str, kept: Bool[np.ndarray, " samples"]) -> dict[str, Int[np.ndarray, " k"]]:
        return {label: np.array([sample.labels[label] for sample in self._samples[split]], np.int64)[kept] for label in self._class_names}

    def _label_facts(self, label: str, labels: Mapping[str, Mapping[str, Int[np.ndarray, " k"]]]) -> dict[str, Any]:
        train, test = labels[TRAIN][label], labels[self._split][label]
        return {
            "num_classes": len(self._class_names[label]),
            "class_names": self._class_names[label],
            "chance": float((test == np.bincount(train).argmax()).mean()),  # always the training split's most common class
            "num_train": len(train),
            "num_test": len(test),
        }

    def _identity(self, candidate: FrozenEncoder, module: nn.Module) -> dict[str, Any]:
        """What a probe of an encoder depends on."""
        compute = {
            "device": device_kind(self._device),
            "dtype": "bfloat16" if self._bfloat16 else "float32",
            "torch": str(torch.__version__),
        }
        return {
            "fingerprint": fingerprint(candidate, module),
            "index_hash": self._index_hash,
            "view": candidate.view.model_dump(mode="json"),
            "compute": compute | candidate.libraries,
            **self._config.model_dump(mode="json", exclude=_OF_THE_COMMAND),
        }


def _check_memory(candidate: FrozenEncoder, clips: Mapping[str, Clips], max_bytes: int) -> None:
    clip_bytes = math.prod(candidate.view.clip_shape)
    token_bytes = candidate.grid.num_tokens * candidate.config.width * 4
    num_clips = 0
    for of in clips.values():
        cut = of.cut(of.samples[0], 0)
        num_clips += len(of.samples) * cut.num_segments * cut.num_views
    needed_bytes = num_clips * (clip_bytes + token_bytes)
    if needed_bytes > max_bytes:
        raise ValueError(
            f"{candidate.name}: got {num_clips} clips whose pixels and tokens take {needed_bytes / 1e9:.1f} GB, expected at most "
            f"{max_bytes / 1e9:.1f} GB: raise --max-feature-bytes, keep them on disk (--features DIR), or take other clips in each epoch (--augment)"
        )


def _by_view(candidates: Sequence[FrozenEncoder]) -> Iterator[tuple[ViewConfig, list[FrozenEncoder]]]:
    """Candidates that look at the same clips, together, so that these are decoded once."""
    views = {candidate.view.model_dump_json(): candidate.view for candidate in candidates}
    for text, view in views.items():
        yield view, [candidate for candidate in candidates if candidate.view.model_dump_json() == text]


def checkpoint_name(path: str) -> str:
    """A run directory's name; a checkpoint's with its run's in front."""
    resolved = Path(path.partition("?")[0]).resolve()  # an address may have options
    return f"{resolved.parents[1].name}/{resolved.name}" if resolved.parent.name == "checkpoints" else resolved.name


def _say(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
