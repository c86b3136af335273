"""Frozen features: the tokens that an encoder gives for the clips of labelled videos, from memory, from disk,
or computed when needed."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from salt_distill.common.config import LoaderConfig, ViewConfig
from salt_distill.common.console import console
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.pixels import normalise
from salt_distill.student_trainer.ranks import Worker

_AHEAD = 2
"""Batches that are decoded while one is computed."""


def labelled_samples(data: str) -> dict[str, list[Sample]]:
    """The samples of each split, shard after shard."""
    splits: dict[str, list[Sample]] = {}
    for shard in open_dataset(data).samples("all"):
        for sample in shard:
            splits.setdefault(sample.split, []).append(sample)
    return splits


def common_labels(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """Names of the labels that every sample carries, and of those that only some do; both sorted."""
    names = [set(sample.labels) for sample in samples]
    everywhere = set[str]().union(names[0]).intersection(*names)
    return sorted(everywhere), sorted(set[str]().union(*names) - everywhere)


class DecodedClips:
    """The clips of a split's samples, decoded in the order asked for, a few batches ahead."""

    def __init__(
        self, reader: Reader, samples: Sequence[Sample], cut: Callable[[Sample, int], SegmentCut]
    ) -> None:
        """``cut``: what is taken of a sample in an epoch, of one shape throughout."""
        self.samples = samples
        self.cut = cut
        self.reader = reader

    def batches(
        self, idx: Sequence[Int[np.ndarray, " b"]], epoch: int = 0
    ) -> Iterator[tuple[Bool[np.ndarray, " b"], np.ndarray]]:
        """For each list of samples: which could be decoded, and those samples' clips, uint8 ``[b, clips, t,
        h, w, 3]``.

        Raises ValueError above ``loader.max_bad_fraction``.
        """

        def decode(rows: Int[np.ndarray, " b"]) -> tuple[Bool[np.ndarray, " b"], np.ndarray]:
            samples = [self.samples[row] for row in rows]
            batch = self.reader.segments(samples, [self.cut(sample, epoch) for sample in samples])
            pixels = batch.pixels if batch.good.all() else batch.pixels[batch.good]
            return batch.good, rearrange(pixels, "b (c t) h w rgb -> b c t h w rgb", t=self.num_frames)

        with ThreadPoolExecutor(1, thread_name_prefix="decode-ahead") as thread:
            pending = deque(thread.submit(decode, rows) for rows in idx[:_AHEAD])
            for rows in [*idx[_AHEAD:], *[None] * min(_AHEAD, len(idx))]:
                ready = pending.popleft()
                if rows is not None:
                    pending.append(thread.submit(decode, rows))
                yield ready.result()

    @property
    def num_frames(self) -> int:
        """Of one clip."""
        return self.cut(self.samples[0], 0).view.num_frames


class EncoderOnDevice:
    """An encoder on its device, in eval mode, without gradient."""

    def __init__(
        self,
        encoder: FrozenEncoder,
        module: nn.Module,
        device: torch.device,
        *,
        batch_size: int,
        bfloat16: bool,
    ) -> None:
        self.module = module.to(device).eval().requires_grad_(False)
        self.device, self.bfloat16 = device, bfloat16
        self._mean, self._std, self._batch_size = encoder.mean, encoder.std, batch_size

    @torch.no_grad()
    def tokens(self, pixels: UInt8[np.ndarray, "b c t h w 3"], num_views: int) -> Float[Tensor, "b v n e"]:
        """The final-norm tokens in float32: those of a view's segments one after the other."""
        clips = torch.from_numpy(rearrange(pixels, "b c t h w rgb -> (b c) t h w rgb"))
        clips = clips.pin_memory() if self.device.type == "cuda" else clips
        tokens = []
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            for batch in clips.split(self._batch_size):
                tokens.append(
                    self.module(
                        normalise(batch.to(self.device, non_blocking=True), self._mean, self._std)
                    ).float()
                )
        return rearrange(torch.cat(tokens), "(b v s) n e -> b v (s n) e", b=len(pixels), v=num_views)


class TokenSource(Protocol):
    """The tokens of a split, wherever they come from."""

    kept: Bool[np.ndarray, " samples"]
    """The samples that have any, which are numbered without the others: False where a video is known to be
    bad. The same on every rank."""

    def share(self, numbers: Int[np.ndarray, " b"]) -> Int[np.ndarray, " k"]:
        """Those of a global batch that are this rank's, in order; each is one rank's."""
        ...

    def batches(
        self, idx: Sequence[Int[np.ndarray, " b"]], epoch: int
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Float[Tensor, "b v n e"]]]:
        """For each list of numbers: those that have tokens after all, and their tokens, on the encoder's
        device."""
        ...


class TokensInMemory:
    """Tokens in memory, all of which were computed before, each on one rank."""

    def __init__(
        self, kept: Bool[np.ndarray, " samples"], tokens: Float[Tensor, "k v n e"], first: int = 0
    ) -> None:
        """``tokens``: this rank's, of the numbers from ``first`` on."""
        self.kept, self._tokens, self._first = kept, tokens, first

    def share(self, numbers: Int[np.ndarray, " b"]) -> Int[np.ndarray, " k"]:
        """Those whose tokens are here."""
        return numbers[(numbers >= self._first) & (numbers < self._first + len(self._tokens))]

    def batches(
        self, idx: Sequence[Int[np.ndarray, " b"]], epoch: int
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Float[Tensor, "b v n e"]]]:
        """As in ``TokenSource``; the same in every epoch."""
        for numbers in idx:
            yield numbers, self._tokens[torch.from_numpy(numbers - self._first).to(self._tokens.device)]


class TokensOfEpoch:
    """Tokens of clips that are taken anew in every epoch."""

    def __init__(self, encoder: EncoderOnDevice, clips: DecodedClips, worker: Worker) -> None:
        self.kept = np.ones(len(clips.samples), bool)
        self._encoder, self._clips, self._worker = encoder, clips, worker

    def share(self, numbers: Int[np.ndarray, " b"]) -> Int[np.ndarray, " k"]:
        """As many as every other rank's, or one more or less."""
        return part_of(numbers, self._worker)

    def batches(
        self, idx: Sequence[Int[np.ndarray, " b"]], epoch: int
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Float[Tensor, "b v n e"]]]:
        """As in ``TokenSource``."""
        num_views = self._clips.cut(self._clips.samples[0], epoch).num_views
        for numbers, (good, pixels) in zip(idx, self._clips.batches(idx, epoch), strict=True):
            yield (
                numbers[good],
                self._encoder.tokens(pixels, num_views) if good.any() else torch.empty(0, 0, 0, 0),
            )


def part_of(numbers: Int[np.ndarray, " n"], worker: Worker) -> Int[np.ndarray, " k"]:
    """A rank's part of the numbers: those of all ranks one after the other are all of them."""
    return np.array_split(numbers, worker.world_size)[worker.rank]


def in_batches(numbers: Int[np.ndarray, " n"], batch_size: int) -> list[Int[np.ndarray, " b"]]:
    """All numbers, in order; none gives no batch."""
    return [numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size)]


def first_clips(
    data: str, split: str, view: ViewConfig, loader: LoaderConfig, number: int
) -> tuple[list[str], UInt8[np.ndarray, "b t h w 3"]]:
    """Keys and evaluation views of a split's first ``number`` samples, without those that can't be decoded,
    which are named.

    Raises ValueError where none is left.
    """
    with contextlib.closing(
        Reader(data, data_seed=0, views=1, view=view, split=split, loader=loader)
    ) as reader:
        samples = list(itertools.islice(itertools.chain.from_iterable(reader.samples), number))
        batch = reader.evaluation(samples)
    for key, reason in reader.skipped.items():
        console.print(f"left out: {key}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if not batch.good.any():
        raise ValueError(f"{data}: none of the first {number} clips of split {split!r} can be decoded")
    return [sample.key for sample, good in zip(samples, batch.good, strict=True) if good], batch.pixels[
        batch.good
    ]
