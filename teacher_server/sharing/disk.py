"""Targets on disk behind those in memory: a ``GrowingCache`` on a thread of its own, never on the event
loop."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from salt_distill.common.config import TargetDtype
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.targets.growing_cache import GrowingCache
from salt_distill.common.targets.manifest import CacheSpec

logger = logging.getLogger(__name__)


class DiskTargets:
    """Write-through and read source. A disk that is too slow or fails costs its targets, never an answer:
    they are counted and named."""

    def __init__(self, root: Path, spec: CacheSpec, *, segment_bytes: int) -> None:
        self.dtype: TargetDtype = spec.target_dtype
        self._store = GrowingCache(root, spec, segment_bytes=segment_bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._waiting_bytes, self._max_waiting_bytes = 0, 2 * segment_bytes
        self.not_written = 0
        """Targets that the disk was too slow for, or failed at."""
        self._corrupt = 0

    def __len__(self) -> int:
        return len(self._store)

    @property
    def corrupt(self) -> int:
        """Targets whose bytes on disk were damaged, and those of damaged files; they are computed again."""
        return self._corrupt + self._store.num_left_out

    async def find(self, clip_digests: Iterable[bytes]) -> dict[bytes, EncodedTarget]:
        """The targets that are there."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._find, list(clip_digests))

    def put(self, dtype: TargetDtype, targets: Mapping[bytes, EncodedTarget]) -> None:
        """Writes targets in the background; those of another rounding than the cache's stay in memory
        only."""
        if dtype != self.dtype:
            return
        num_bytes = sum(target.num_bytes for target in targets.values())
        if self._waiting_bytes and self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            self.not_written += len(targets)
            return
        self._waiting_bytes += num_bytes
        written = asyncio.get_running_loop().run_in_executor(self._thread, self._add, targets)
        written.add_done_callback(lambda done: self._written(num_bytes))

    def close(self) -> None:
        """Seals what is there. Blocks."""
        self._thread.submit(self._close).result()
        self._thread.shutdown(wait=True)

    def _find(self, clip_digests: list[bytes]) -> dict[bytes, EncodedTarget]:
        targets = {}
        for digest in clip_digests:
            try:
                encoded = self._store.find(digest)
            except CorruptTargetError as error:
                self._corrupt += 1
                logger.warning("the target cache is damaged, and the target is computed again: %s", error)
            else:
                if encoded is not None:
                    targets[digest] = encoded
        return targets

    def _add(self, targets: Mapping[bytes, EncodedTarget]) -> None:
        at_stake = self._store.num_open + len(targets)
        try:
            self._store.add(targets)
        except (OSError, ValueError) as error:
            self._failed(at_stake, error)

    def _close(self) -> None:
        at_stake = self._store.num_open
        try:
            self._store.close()
        except (OSError, ValueError) as error:
            self._failed(at_stake, error)

    def _failed(self, num_targets: int, error: OSError | ValueError) -> None:
        self.not_written += num_targets
        logger.error("the target cache lost %d targets, and serving goes on: %s", num_targets, error)

    def _written(self, num_bytes: int) -> None:
        self._waiting_bytes -= num_bytes
