"""Targets on disk, from a cache that was made before."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from jaxtyping import Shaped
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import (
    TargetDtype,
    ViewConfig,
)
from salt_distill.common.data.index import load_index
from salt_distill.common.data.views import VIEW_VERSION, view_facts
from salt_distill.common.folders.fetched import fetched
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.targets import codec
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.student_trainer.targets.host_memory import new_targets


class TargetMissError(ValueError):
    """A clip that the target cache does not hold."""


class StoredTargets:
    """Targets on disk; no teacher, no network. A clip that is not there stops the run."""

    name = "cache"
    clip_flops = 0.0

    def __init__(
        self,
        path: str | Path,
        dtype: TargetDtype,
        *,
        data: str,
        split: str,
        data_seed: int,
        view: ViewConfig,
        decoder: str,
    ) -> None:
        """``data`` and what follows are the student's own, to explain a miss."""
        self._cache = TargetCache(fetched(path))
        cached = self._cache.spec
        if cached.target_dtype != dtype:
            raise ValueError(
                f"{path} holds {cached.target_dtype} targets, expected {dtype}: pass --target-dtype"
                f" {cached.target_dtype}"
            )
        self.dtype: TargetDtype = dtype
        self.spec = cached.teacher
        self.views = cached.views
        """K: the student's view number is its pass modulo K."""
        self._path, self._data = path, data
        self._mine = {"data_seed": data_seed, "view": view_facts(view), "decoder": decoder, "split": split}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="targets")
        self._rows_read = 0

    def request(
        self, batch: ClipBatch, *, masks: Sequence[MaskGroup] = (), slot: int = 0
    ) -> Future[Shaped[Tensor, "b n packed"]]:
        """See TargetSource."""
        return self._pool.submit(self._read, batch)

    def report(self, line: MetricsLine, *, is_last: bool = False) -> None:
        """Nobody watches."""

    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def counters(self) -> dict[str, int | float]:
        """See TargetSource."""
        return {"rows_read": self._rows_read}

    def close(self) -> None:
        """See TargetSource."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, batch: ClipBatch) -> Shaped[Tensor, "b n packed"]:
        out = new_targets(batch, self.spec, self.dtype)
        for row, encoded in enumerate(self._cache.targets(batch.digests)):
            if not batch.good[row]:
                continue
            if encoded is None:
                raise TargetMissError(self._explain(batch, row))
            try:
                codec.pack_into(out[row], encoded, self.dtype)
            except codec.CorruptTargetError as error:
                cached = self._cache.find(batch.digests[row])
                assert cached is not None, "it was found a moment ago"
                raise codec.CorruptTargetError(
                    f"{self._path}: sample {cached.key}, view {cached.view}: {error}"
                ) from error
        self._rows_read += int(batch.good.sum())
        return out

    def _explain(self, batch: ClipBatch, row: int) -> str:
        theirs = self._cache.spec.to_json()
        different = [
            f"{name}: here {mine}, in the cache {theirs[name]}"
            for name, mine in self._mine.items()
            if theirs[name] not in (None, mine)
        ]
        if not different:
            different = self._other_data()
        same = [f"{name}: {mine}" for name, mine in self._mine.items() if theirs[name] == mine]
        advice = "Run with the cache's values, or precompute with these"
        if theirs["view"] and (version := theirs["view"].get("version", 1)) != VIEW_VERSION:
            advice = (
                f"Precompute again: equal draws give other crops in view version {VIEW_VERSION}, which is"
                f" used here, than in the cache's, {version}"
            )
        return (
            f"{self._path} has no targets for clip {batch.digests[row].hex()[:12]} (sample {batch.keys[row]},"
            f" view {batch.views[row]} of {self.views}). Different: {'; '.join(different) or 'none'}. Equal:"
            f" {'; '.join(same) or 'none'}. {advice}"
        )

    def _other_data(self) -> list[str]:
        """How the data set is not the one that the cache was made of."""
        info, _ = load_index(self._data)
        cached = self._cache.spec.index_hash
        if cached in (None, info.index_hash):
            return []
        return [
            f"data set: here {self._data} with index hash {info.index_hash}, in the cache one with {cached}"
        ]
