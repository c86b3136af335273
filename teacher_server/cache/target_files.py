"""Files of a target cache made from a data set: a file for each view of each shard."""

import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import PrecomputeConfig
from salt_distill.common.data.reader import Reader, too_many_bad
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.tasks import Clip
from salt_distill.common.data.views import view_facts
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.targets import codec
from salt_distill.common.targets.cache_file import CacheFile, CacheRow, file_path, write_file
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.targets.manifest import CacheSpec, FileListing
from salt_distill.teacher_server.cache.cache_folder import CacheFolder


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """One file to come."""

    view: int
    shard_idx: int
    shard: str
    """Name of its tar."""
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class FileDone:
    """One file that is there, whole."""

    name: str
    """Relative to the cache."""
    listing: FileListing
    """What the manifest is to say of it."""
    num_bytes: int
    num_samples: int
    skipped: dict[str, str]
    """Samples that do not decode, with the reason where this command met it."""
    remark: str | None
    """What people should know: the file was damaged."""
    num_computed: int
    """Targets that went through the teacher now."""


class TargetMaker:
    """A teacher and a reader that make files of the cache. Each file is a pure function of the
    configuration."""

    def __init__(self, config: PrecomputeConfig, device: torch.device | None) -> None:
        self._cache = CacheFolder(config.out)
        self._batch_size, self._views = config.teacher.batch_size, config.views
        encoder = open_encoder(config)
        view = config.view.over(encoder.view)
        self._teacher = Teacher(encoder, config.teacher, device)
        self._reader = Reader(
            config.data,
            data_seed=config.data_seed,
            views=config.views,
            view=view,
            split=config.split,
            loader=config.loader,
        )
        self._max_bad_fraction = config.loader.max_bad_fraction
        self._spec = CacheSpec(
            teacher=self._teacher.spec,
            target_dtype=config.target_dtype,
            shape=(self._teacher.spec.num_tokens, self._teacher.spec.width),
            data_seed=config.data_seed,
            views=config.views,
            view=view_facts(view),
            decoder=self._reader.decoder,
            index_hash=self._reader.index_hash,
            split=config.split,
        )

    def spec(self) -> CacheSpec:
        """What all files have in common."""
        return self._spec

    def tasks(self) -> list[FileTask]:
        """The files of the cache: all views of a shard follow each other, so that a frame cache serves
        them."""
        return [
            FileTask(
                view=view,
                shard_idx=shard_idx,
                shard=self._reader.dataset.shards[shard_idx],
                num_samples=len(samples),
            )
            for shard_idx, samples in enumerate(self._reader.samples)
            for view in range(self._views)
            if len(samples)
        ]

    def rate(self) -> float:
        """Clips per second of the teacher alone, after a forward to warm up."""
        clips = np.zeros((self._batch_size, *self._teacher.spec.clip_shape), np.uint8)
        self._teacher.forward(clips)
        started = time.perf_counter()
        codec.encode(self._teacher.forward(clips), self._spec.target_dtype)
        return self._batch_size / (time.perf_counter() - started)

    def room(self) -> tuple[str, int]:
        """This machine, and the room on its disk for what is made."""
        return socket.gethostname(), self._cache.free_bytes()

    def make(self, task: FileTask, listing: FileListing | None = None) -> FileDone:
        """Makes a file, unless it is there, undamaged and as the ``listing`` of a manifest has it; of one
        that is not, whole targets are kept.

        Raises ValueError where it is another command's.
        """
        samples, name = self._reader.samples[task.shard_idx], file_path(self._spec, task.view, task.shard)
        skipped, computed = dict[str, str](), set[bytes]()
        whole, remark = _WholeTargets(), None
        with self._cache.at_hand(name) as path:
            if path.exists():
                whole, damage = self._check(path, name, listing)
                if not damage:
                    keys = {row.key for row in whole.rows()}
                    skipped = {sample.key: "left out before" for sample in samples if sample.key not in keys}
                    now = listing or FileListing.of(path, len(whole))
                    return _done(name, path, now, samples, skipped)
                remark = f"{damage[0]}; {len(damage)} such, which are computed again"
            num_rows = write_file(path, self._spec, self._rows(samples, task.view, whole, skipped, computed))
            self._cache.put(name, path)
            now = FileListing.of(path, num_rows)
            return _done(name, path, now, samples, skipped, remark, len(computed))

    def _check(
        self, path: Path, name: str, listing: FileListing | None
    ) -> tuple["_WholeTargets", list[CorruptTargetError]]:
        """The whole targets of a file that is there, and what is wrong with it."""
        called = f"{self._cache.place}/{name}"
        try:
            file = CacheFile(path, self._spec, called)
            numbers, damage = file.check()
        except CorruptTargetError as error:
            return _WholeTargets(), [error]
        whole = _WholeTargets(file, numbers)
        if not damage and listing is not None and (now := FileListing.of(path, len(file))) != listing:
            damage = [CorruptTargetError(f"{called}: {now.difference(listing)}")]
        return whole, damage

    def _rows(
        self,
        samples: Sequence[Sample],
        view: int,
        whole: "_WholeTargets",
        skipped: dict[str, str],
        computed: set[bytes],
    ) -> Iterator[CacheRow]:
        """The rows of a file. ``whole``: targets that need no forward; adds to ``skipped`` samples, to
        ``computed`` clips."""
        for group in self._groups(samples, view):
            skipped.update(
                {sample.key: str(clip) for sample, clip in group if isinstance(clip, BadVideoError)}
            )
            if too_many_bad(len(samples), len(skipped), self._max_bad_fraction):
                key, reason = next(iter(skipped.items()))
                raise ValueError(
                    f"got {len(skipped)} videos that do not decode in a shard of {len(samples)}, expected at"
                    f" most loader.max_bad_fraction={self._max_bad_fraction:g} of them; the first is {key}:"
                    f" {reason}"
                )
            good = [(sample, *clip) for sample, clip in group if not isinstance(clip, BadVideoError)]
            missing = {digest: pixels for _, pixels, digest in good if digest not in whole}
            computed.update(missing)
            new = dict[bytes, EncodedTarget]()
            if missing:
                targets = self._teacher.forward(np.stack(list(missing.values())))
                new = dict(zip(missing, codec.encode(targets, self._spec.target_dtype), strict=True))
            for sample, _, digest in good:
                yield CacheRow(
                    clip_digest=digest, key=sample.key, view=view, encoded=new.get(digest) or whole[digest]
                )

    def _groups(
        self, samples: Sequence[Sample], view: int
    ) -> Iterator[list[tuple[Sample, Clip | BadVideoError]]]:
        """The clips of each forward; those of the next one are decoded meanwhile."""
        ahead: deque[list[tuple[Sample, Future[Clip]]]] = deque()
        for first in range(0, len(samples), self._batch_size):
            group = [samples[number] for number in range(first, min(first + self._batch_size, len(samples)))]
            ahead.append([(sample, self._reader.submit(sample, view)) for sample in group])
            if len(ahead) == 2:
                yield [(sample, _clip(clip)) for sample, clip in ahead.popleft()]
        while ahead:
            yield [(sample, _clip(clip)) for sample, clip in ahead.popleft()]


class _WholeTargets:
    """Targets of a file that are what was written, by their clips; in the file until they are asked for."""

    def __init__(self, file: CacheFile | None = None, numbers: Sequence[int] = ()) -> None:
        self._file, self._numbers = file, numbers
        self._by_clip = {row.clip_digest: number for row, number in zip(self.rows(), numbers, strict=True)}

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, clip_digest: bytes) -> bool:
        return clip_digest in self._by_clip

    def __getitem__(self, clip_digest: bytes) -> EncodedTarget:
        assert self._file is not None, "without a file there are no targets"
        return self._file.encoded(self._by_clip[clip_digest])

    def rows(self) -> Iterator[CacheRow]:
        """All of them."""
        return iter(()) if self._file is None else self._file.rows(self._numbers)


def _clip(clip: Future[Clip]) -> Clip | BadVideoError:
    try:
        return clip.result()
    except BadVideoError as error:
        return error


def _done(
    name: str,
    path: Path,
    listing: FileListing,
    samples: Sequence[Sample],
    skipped: dict[str, str],
    remark: str | None = None,
    num_computed: int = 0,
) -> FileDone:
    return FileDone(
        name=name,
        listing=listing,
        num_bytes=path.stat().st_size,
        num_samples=len(samples),
        skipped=skipped,
        remark=remark,
        num_computed=num_computed,
    )
