"""Every encoder on the same labelled clips, by one process or by several together: tokens, probes, scores."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from rich.progress import Progress
from torch import nn

from salt_distill.common.config import ProbeConfig, ViewConfig
from salt_distill.common.console import console
from salt_distill.common.data.reader import Reader, require_few_bad
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.model.compute import uses_bfloat16
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.teacher import device_kind, fingerprint
from salt_distill.student_trainer.evaluation.probe.augment import ImageCut
from salt_distill.student_trainer.evaluation.probe.cuts import cuts, drawn
from salt_distill.student_trainer.evaluation.probe.feature_files import (
    FeatureFacts,
    TokensOnDisk,
    write_features,
)
from salt_distill.student_trainer.evaluation.probe.features import (
    DecodedClips,
    EncoderOnDevice,
    TokensInMemory,
    TokensOfEpoch,
    TokenSource,
    in_batches,
    part_of,
)
from salt_distill.student_trainer.evaluation.probe.probe_grid import ProbeGrid, ProbeIdentity, ProbeSetting
from salt_distill.student_trainer.evaluation.probe.results import (
    TRAIN,
    VAL,
    ClipPrediction,
    LabelFacts,
    LabelResult,
)
from salt_distill.student_trainer.evaluation.probe.score import score_of
from salt_distill.student_trainer.evaluation.records import EncoderIdentity
from salt_distill.student_trainer.ranks import Worker


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """What all encoders are asked."""

    samples: Mapping[str, Sequence[Sample]]
    """Of each split; where there are several settings, of VAL as well."""
    labels: Sequence[str]
    split: str
    """Whose accuracy is reported."""


@dataclass(frozen=True, kw_only=True)
class ProbeOutcome:
    """What was found, the same on every rank."""

    results: dict[str, dict[str, LabelResult]]
    """For each encoder and label."""
    encoders: dict[str, EncoderIdentity]
    labels: dict[str, LabelFacts]


@dataclass(frozen=True, kw_only=True)
class _ProbedEncoder:
    """What was found of one encoder."""

    results: dict[str, LabelResult]
    identity: EncoderIdentity
    labels: dict[str, LabelFacts]


class ProbeRunner:
    """Every encoder, one after the other, on the same labelled clips.

    Note [probe ranks]: every rank makes a ProbeRunner and calls ``all``. A rank has the forward of its part
    of each split's clips, the same part for every encoder, and of every step of the probes those of the
    global batch whose tokens it has in memory; where all of them are on disk, or come from a forward of their
    own in each epoch, an equal part of the global batch.
    """

    def __init__(
        self, config: ProbeConfig, task: ProbeTask, state: Path, worker: Worker, say: Callable[[str], None]
    ) -> None:
        """``state``: the folder of what ``--resume`` goes on from. ``say``: takes sentences for people; rank
        0's are all that there are."""
        dataset = open_dataset(config.data)
        self._config, self._samples, self._split = config, task.samples, task.split
        self._state, self._worker, self._say = state, worker, say
        self._class_names = {label: dataset.class_names[label] for label in task.labels}
        self._index_hash = dataset.index_hash
        self._settings = [ProbeSetting(lr, decay) for lr in config.lr for decay in config.weight_decay]
        self._bfloat16 = uses_bfloat16(config.dtype, worker.device)

    def all(self, candidates: Sequence[FrozenEncoder]) -> ProbeOutcome:
        """For each encoder and label what was found."""
        names = [candidate.name for candidate in candidates]
        probed: dict[str, _ProbedEncoder] = {}
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("probing", total=len(candidates))
            for view, members in _by_view(candidates):
                with closing(self._reader(view)) as reader:
                    clips = {split: self._clips(reader, view, split) for split in self._samples}
                    pixels = self._pixels(clips, members)
                    for candidate in members:
                        state = self._state / f"{names.index(candidate.name)}.pt"
                        probed[candidate.name] = self._probe(candidate, clips, pixels, state)
                        progress.advance(bar)
                    for key, reason in self._skipped(reader).items():
                        self._say(f"left out: {key}: {reason}")
        return ProbeOutcome(
            results={name: probed[name].results for name in names},
            encoders={name: probed[name].identity for name in names},
            labels=probed[names[-1]].labels,
        )

    def _reader(self, view: ViewConfig) -> Reader:
        config = self._config
        return Reader(config.data, data_seed=0, views=1, view=view, split="all", loader=config.loader)

    def _probe(
        self,
        candidate: FrozenEncoder,
        clips: Mapping[str, DecodedClips],
        pixels: Mapping[str, list[tuple[Bool[np.ndarray, " b"], np.ndarray]]],
        state: Path,
    ) -> "_ProbedEncoder":
        """An encoder's probes, trained and scored."""
        module = candidate.load()
        identity = self._identity(candidate, module)
        batch_size = self._config.encode_batch_size
        encoder = EncoderOnDevice(
            candidate, module, self._worker.device, batch_size=batch_size, bfloat16=self._bfloat16
        )
        tokens = {split: self._tokens(split, clips[split], encoder, pixels, identity) for split in clips}
        labels = {split: self._labels(split, source.kept) for split, source in tokens.items()}
        grid = self._trained(candidate, tokens[TRAIN], labels[TRAIN], state, identity, clips[TRAIN].reader)
        return _ProbedEncoder(
            results=self._examined(grid, tokens, labels),
            identity=EncoderIdentity.of(candidate, identity.fingerprint),
            labels={label: self._label_facts(label, labels) for label in self._class_names},
        )

    def _clips(self, reader: Reader, view: ViewConfig, split: str) -> DecodedClips:
        fixed = cuts(self._config, view, split, num_views=self._config.views)
        return DecodedClips(
            reader,
            self._samples[split],
            lambda sample, epoch: fixed or drawn(self._config, view, sample, epoch),
        )

    def _pixels(
        self, clips: Mapping[str, DecodedClips], members: Sequence[FrozenEncoder]
    ) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """Every clip of this rank's part, where all of them stay in memory: several encoders look at them."""
        if self._config.augment or self._config.features is not None:
            return {}
        for candidate in members:
            _check_memory(candidate, clips, self._config.max_feature_bytes, self._worker.world_size)
        idx = {
            split: in_batches(
                part_of(np.arange(len(of.samples)), self._worker), self._config.encode_batch_size
            )
            for split, of in clips.items()
        }
        return self._worker.together(
            lambda: {split: list(of.batches(idx[split])) for split, of in clips.items()}
        )

    def _tokens(
        self,
        split: str,
        clips: DecodedClips,
        encoder: EncoderOnDevice,
        pixels: Mapping[str, list[tuple[Bool[np.ndarray, " b"], np.ndarray]]],
        identity: ProbeIdentity,
    ) -> TokenSource:
        """From where the configuration says."""
        cut = clips.cut(clips.samples[0], 0)
        if self._config.augment:
            return TokensOfEpoch(encoder, clips, self._worker)
        if self._config.features is None:
            return self._tokens_in_memory(encoder, pixels[split], cut.num_views)
        facts = FeatureFacts(
            fingerprint=identity.fingerprint,
            index_hash=identity.index_hash,
            decoder=clips.reader.decoder,
            compute=identity.compute,
            split=split,
            view=cut.view,
            clips=(cut.num_segments, cut.num_views, cut.square),
            antialias=isinstance(cut, ImageCut),
        )
        path = facts.path(self._config.features)
        if not self._worker.ranks.all_values(path.exists())[0]:
            write_features(path, facts, encoder, clips, self._config.encode_batch_size, self._worker)
        tokens = TokensOnDisk(path, [sample.key for sample in clips.samples], self._worker)
        if not tokens.kept.all():
            self._say(
                f"{path}: {(~tokens.kept).sum()} clips of {split!r} are not there: they could not be decoded"
                " when it was written"
            )
        return tokens

    def _tokens_in_memory(
        self,
        encoder: EncoderOnDevice,
        pixels: Sequence[tuple[Bool[np.ndarray, " b"], np.ndarray]],
        num_views: int,
    ) -> TokensInMemory:
        tokens = self._worker.together(
            lambda: [encoder.tokens(batch, num_views) for _, batch in pixels if len(batch)]
        )
        parts = self._worker.ranks.all_values(
            np.concatenate([np.zeros(0, bool), *(good for good, _ in pixels)])
        )
        first = sum(int(part.sum()) for part in parts[: self._worker.rank])
        return TokensInMemory(
            np.concatenate(parts),
            torch.cat(tokens) if tokens else torch.empty(0, device=self._worker.device),
            first,
        )

    def _trained(
        self,
        candidate: FrozenEncoder,
        tokens: TokenSource,
        labels: Mapping[str, Int[np.ndarray, " k"]],
        state: Path,
        identity: ProbeIdentity,
        reader: Reader,
    ) -> ProbeGrid:
        """Probes that have learned, from where ``state`` is to the last epoch."""
        config = self._config
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
            optimizer=config.optimizer,
            worker=self._worker,
            bfloat16=self._bfloat16,
        )
        if config.resume and self._has(state):
            grid.load(state, identity)
        self._require_few_bad(reader)
        while grid.epoch < config.epochs:
            grid.train_epoch(tokens, labels)
            self._require_few_bad(reader)
            grid.save(state, identity)
        return grid

    def _examined(
        self,
        grid: ProbeGrid,
        tokens: Mapping[str, TokenSource],
        labels: Mapping[str, Mapping[str, Int[np.ndarray, " k"]]],
    ) -> dict[str, LabelResult]:
        """For each label what its best probe does."""
        size = self._config.micro_batch_size or self._config.batch_size
        reported = grid.examine(tokens[self._split], labels[self._split], size)
        by_val = None
        if len(self._settings) > 1:
            by_val = reported if self._split == VAL else grid.examine(tokens[VAL], labels[VAL], size)
        rows = np.flatnonzero(tokens[self._split].kept).tolist()
        results = {}
        for label in self._class_names:
            best, chosen_by = self._settings[0], None
            if by_val is not None:
                scores = {setting: score_of(by_val[label, setting].counts) for setting in self._settings}
                best = max(scores, key=lambda setting: scores[setting].num_correct)  # the first, of equals
                chosen_by = scores[best]
            examined = reported[label, best]
            results[label] = LabelResult(
                setting=best,
                chosen_by=chosen_by,
                counts=examined.counts,
                predictions=[
                    ClipPrediction(
                        key=self._samples[self._split][rows[int(number)]].key,
                        actual=int(labels[self._split][label][number]),
                        predicted=int(predicted),
                        probability=float(probability),
                    )
                    for number, predicted, probability in zip(
                        examined.numbers, examined.predicted, examined.probability, strict=True
                    )
                ],
                weights={
                    name: weight.cpu() for name, weight in grid.probes[label, best].state_dict().items()
                },
            )
        return results

    def _has(self, state: Path) -> bool:
        """Whether there is something to go on from, of which all ranks know or none."""
        seen = self._worker.ranks.all_values(state.exists())
        if seen[0] and not all(seen):
            raise ValueError(
                f"got no {state} on every worker, expected it there: --out names a file in a folder that all"
                " workers share"
            )
        return seen[0]

    def _skipped(self, reader: Reader) -> dict[str, str]:
        """The videos that failed on any rank, and why."""
        return {
            key: reason
            for of_rank in self._worker.ranks.all_values(reader.skipped)
            for key, reason in of_rank.items()
        }

    def _require_few_bad(self, reader: Reader) -> None:
        """Raises ValueError, on every rank, where they left out too many clips together."""
        counts = self._worker.ranks.all_values(reader.counters())
        num_clips, num_bad = (sum(of_rank[name] for of_rank in counts) for name in ("clips", "bad_clips"))
        require_few_bad(num_clips, num_bad, self._skipped(reader), self._config.loader.max_bad_fraction)

    def _labels(self, split: str, kept: Bool[np.ndarray, " samples"]) -> dict[str, Int[np.ndarray, " k"]]:
        return {
            label: np.array([sample.labels[label] for sample in self._samples[split]], np.int64)[kept]
            for label in self._class_names
        }

    def _label_facts(
        self, label: str, labels: Mapping[str, Mapping[str, Int[np.ndarray, " k"]]]
    ) -> LabelFacts:
        train, test = labels[TRAIN][label], labels[self._split][label]
        return LabelFacts(
            num_classes=len(self._class_names[label]),
            class_names=tuple(self._class_names[label]),
            chance=float((test == np.bincount(train).argmax()).mean()),
            num_train=len(train),
            num_test=len(test),
        )

    def _identity(self, candidate: FrozenEncoder, module: nn.Module) -> ProbeIdentity:
        compute = {
            "device": device_kind(self._worker.device),
            "dtype": "bfloat16" if self._bfloat16 else "float32",
            "torch": str(torch.__version__),
        }
        return ProbeIdentity(
            fingerprint=fingerprint(candidate, module),
            index_hash=self._index_hash,
            view=candidate.view,
            compute=compute | candidate.libraries,
            settings=self._config.settings(),
        )


def _check_memory(
    candidate: FrozenEncoder, clips: Mapping[str, DecodedClips], max_bytes: int, num_workers: int
) -> None:
    """Raises ValueError where a worker's part of the clips and of their tokens takes more than
    ``max_bytes``."""
    clip_bytes = math.prod(candidate.view.clip_shape)
    token_bytes = candidate.grid.num_tokens * candidate.config.width * 4
    num_clips = 0
    for of in clips.values():
        cut = of.cut(of.samples[0], 0)
        num_clips += -(-len(of.samples) // num_workers) * cut.num_segments * cut.num_views
    needed_bytes = num_clips * (clip_bytes + token_bytes)
    if needed_bytes > max_bytes:
        raise ValueError(
            f"{candidate.name}: got {num_clips} clips whose pixels and tokens take {needed_bytes / 1e9:.1f}"
            f" GB, expected at most {max_bytes / 1e9:.1f} GB: raise --max-feature-bytes, keep them on disk"
            " (--features DIR), or take other clips in each epoch (--augment)"
        )


def _by_view(candidates: Sequence[FrozenEncoder]) -> Iterator[tuple[ViewConfig, list[FrozenEncoder]]]:
    """Candidates that look at the same clips, together, so that these are decoded once."""
    views = {candidate.view.model_dump_json(): candidate.view for candidate in candidates}
    for text, view in views.items():
        yield view, [candidate for candidate in candidates if candidate.view.model_dump_json() == text]
