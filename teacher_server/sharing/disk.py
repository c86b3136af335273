"""Targets on disk behind those in memory: a ``GrowingCache`` on threads of its own, never on the event
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

_MOST_WAIT_S = 5.0
"""For one target to be read. A disk that takes longer is not asked again until it has answered."""


class DiskTargets:
    """Write-through and read source. A disk that is too slow or fails costs its targets, never an answer:
    they are counted and named."""

    def __init__(self, root: Path, spec: CacheSpec, *, segment_bytes: int) -> None:
        self.dtype: TargetDtype = spec.target_dtype
        self._store = GrowingCache(root, spec, segment_bytes=segment_bytes)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="cache-reader")
        self._waiting_bytes, self._max_waiting_bytes = 0, 2 * segment_bytes
        self.not_written = 0
        """Targets that the disk was too slow for, or failed at."""
        self.not_read = 0
        """Clips that were looked for while the disk did not answer."""
        self._num_read, self._hung_at = 0, -1
        """Clips looked for on disk, and how many they were when it was last found to hang."""
        self._corrupt = 0
        self._named = set[TargetDtype]()
        """Number formats that the log has named."""

    def __len__(self) -> int:
        return len(self._store)

    @property
    def corrupt(self) -> int:
        """Targets whose bytes on disk were damaged, and those of damaged files; they are computed again."""
        return self._corrupt + self._store.num_left_out

    async def find(self, clip_digests: Iterable[bytes]) -> dict[bytes, EncodedTarget]:
        """The targets that are there; none while the disk does not answer."""
        wanted = list(clip_digests)
        reading: asyncio.Future[dict[bytes, EncodedTarget]] | None = None
        while self._num_read != self._hung_at:
            reading = reading or asyncio.get_running_loop().run_in_executor(self._reader, self._find, wanted)
            num_read = self._num_read
            await asyncio.wait([reading], timeout=_MOST_WAIT_S)
            if reading.done():
                return reading.result()
            if self._num_read == num_read:
                self._hung_at = num_read
                logger.error(
                    "the target cache has not read a target in %g s, and its clips are computed", _MOST_WAIT_S
                )
        if reading is not None:
            reading.cancel()
        self.not_read += len(wanted)
        return {}

    def put(self, dtype: TargetDtype, targets: Mapping[bytes, EncodedTarget]) -> None:
        """Writes targets in the background; those of another rounding than the cache's stay in memory
        only."""
        if dtype != self.dtype:
            if dtype not in self._named:
                self._named.add(dtype)
                logger.warning(
                    "got requests for %s targets, and the target cache has %s (service.cache_dtype): they"
                    " are neither written nor found there",
                    dtype,
                    self.dtype,
                )
            return
        num_bytes = sum(target.num_bytes for target in targets.values())
        if self._waiting_bytes and self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            self.not_written += len(targets)
            return
        self._waiting_bytes += num_bytes
        written = asyncio.get_running_loop().run_in_executor(self._writer, self._add, targets)
        written.add_done_callback(lambda done: self._written(num_bytes))

    def close(self) -> None:
        """Seals what is there. Blocks."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.submit(self._close).result()
        self._writer.shutdown(wait=True)

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
            self._num_read += 1
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
