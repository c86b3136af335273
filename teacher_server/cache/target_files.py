"""Files of a target cache made from a data set: a file for each view of each shard."""

import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import PrecomputeConfig
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.sample import Sample
from salt_distill.common.data.tasks import Clip
from salt_distill.common.data.views import view_facts
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.targets import codec, store
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.targets.store import CacheFile, CacheRow, CacheSpec
from salt_distill.teacher_server.cache.folder import CacheFolder


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
    listed: dict[str, Any]
    """What the manifest is to say of it."""
    num_bytes: int
    num_samples: int
    skipped: dict[str, str]
    """Samples that do not decode, with the reason where this command met it."""
    remark: str | None
    """What people should know: the file was damaged."""
    num_computed: int
    """Targets that went through the teacher now."""


class Worker:
    """A teacher and a reader that make files of the cache. Each file is a pure function of the
    configuration."""

    def __init__(self, config: PrecomputeConfig, device: torch.device | None) -> None:
        self._cache, self._batch_size, self._views = (
            CacheFolder(config.out),
            config.teacher.batch_size,
            config.views,
        )
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
            teacher=self._teacher.spec.to_json(),
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

    def make(self, task: FileTask, listed: dict[str, Any] | None = None) -> FileDone:
        """Makes a file, unless it is there, undamaged and as a manifest has ``listed`` it; of one that is
        not, whole targets are kept.

        Raises ValueError where it is another command's.
        """
        samples, name = (
            self._reader.samples[task.shard_idx],
            store.file_path(self._spec, task.view, task.shard),
        )
        kept, skipped, computed = dict[bytes, EncodedTarget](), dict[str, str](), set[bytes]()
        remark = None
        with self._cache.at_hand(name) as path:
            if path.exists():
                rows, damage, now = self._check(path, name, listed)
                if now is not None:
                    keys = {row.key for row in rows}
                    skipped.update(
                        {sample.key: "left out before" for sample in samples if sample.key not in keys}
                    )
                    return _done(name, path, now, samples, skipped)
                kept = {row.clip_digest: row.encoded for row in rows}
                remark = f"{damage[0]}; {len(damage)} such, which are computed again"
            num_rows = store.write_file(
                path, self._spec, self._rows(samples, task.view, kept, skipped, computed)
            )
            self._cache.put(name, path)
            return _done(name, path, store.listing(path, num_rows), samples, skipped, remark, len(computed))

    def _check(
        self, path: Path, name: str, listed: dict[str, Any] | None
    ) -> tuple[list[CacheRow], list[CorruptTargetError], dict[str, Any] | None]:
        """The whole rows of a file that is there, what is wrong with it, and where nothing is, what a
        manifest is to say of it."""
        called = f"{self._cache.place}/{name}"
        try:
            rows, damage = CacheFile(path, self._spec, called).check()
        except CorruptTargetError as error:
            return [], [error], None
        if damage:
            return rows, damage, None
        now = store.listing(path, len(rows))
        if listed in (None, now):
            return rows, [], now
        return rows, [CorruptTargetError(f"{called}: {store.difference(now, listed)}")], None

    def _rows(
        self,
        samples: Sequence[Sample],
        view: int,
        kept: Mapping[bytes, EncodedTarget],
        skipped: dict[str, str],
        computed: set[bytes],
    ) -> Iterator[CacheRow]:
        """The rows of a file. ``kept``: targets by clip that need no forward; adds to ``skipped`` samples, to
        ``computed`` clips."""
        for group in self._groups(samples, view):
            skipped.update(
                {sample.key: str(clip) for sample, clip in group if isinstance(clip, BadVideoError)}
            )
            if len(skipped) > self._max_bad_fraction * max(len(samples), 100):
                key, reason = next(iter(skipped.items()))
                raise ValueError(
                    f"got {len(skipped)} videos that do not decode in a shard of {len(samples)}, expected at"
                    f" most loader.max_bad_fraction={self._max_bad_fraction:g} of them; the first is {key}:"
                    f" {reason}"
                )
            good = [(sample, *clip) for sample, clip in group if not isinstance(clip, BadVideoError)]
            missing = {digest: pixels for _, pixels, digest in good if digest not in kept}
            computed.update(missing)
            new = dict[bytes, EncodedTarget]()
            if missing:
                targets = self._teacher.forward(np.stack(list(missing.values())))
                new = dict(zip(missing, codec.encode(targets, self._spec.target_dtype), strict=True))
            for sample, _, digest in good:
                yield CacheRow(
                    clip_digest=digest, key=sample.key, view=view, encoded=new.get(digest) or kept[digest]
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


def _clip(clip: Future[Clip]) -> Clip | BadVideoError:
    try:
        return clip.result()
    except BadVideoError as error:
        return error


def _done(
    name: str,
    path: Path,
    listed: dict[str, Any],
    samples: Sequence[Sample],
    skipped: dict[str, str],
    remark: str | None = None,
    num_computed: int = 0,
) -> FileDone:
    return FileDone(
        name=name,
        listed=listed,
        num_bytes=path.stat().st_size,
        num_samples=len(samples),
        skipped=skipped,
        remark=remark,
        num_computed=num_computed,
    )
