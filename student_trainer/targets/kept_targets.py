"""What a service gave, kept on disk for the next epoch or run (``--cache``)."""

import logging
import threading
from pathlib import Path

from salt_distill.common.config import TargetDtype
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.targets.codec import CorruptTargetError, EncodedTarget
from salt_distill.common.targets.growing_cache import GrowingCache
from salt_distill.common.targets.manifest import CacheSpec

logger = logging.getLogger(__name__)


class KeptTargets:
    """A ``GrowingCache`` for the threads of one rank. A disk that fails, or damaged targets, cost a request
    to the service, never the run."""

    def __init__(
        self, root: str | Path, spec: TeacherSpec, dtype: TargetDtype, *, segment_bytes: int
    ) -> None:
        """Raises ValueError where the folder holds targets of another teacher, dtype or kind."""
        kind = CacheSpec(teacher=spec, target_dtype=dtype, shape=(spec.num_tokens, spec.width))
        self._store = GrowingCache(Path(root), kind, segment_bytes=segment_bytes)
        self._lock = threading.Lock()
        self._counters = {"cache_hits": 0, "cache_misses": 0, "cache_corrupt": 0, "cache_not_written": 0}

    def find(self, clip_digest: bytes) -> EncodedTarget | None:
        """The whole target of a clip, if it is there."""
        with self._lock:
            try:
                encoded = self._store.find(clip_digest)
            except CorruptTargetError as error:
                self._counters["cache_corrupt"] += 1
                logger.warning("the target cache is damaged, and the service is asked: %s", error)
                encoded = None
            self._counters["cache_misses" if encoded is None else "cache_hits"] += 1
            return encoded

    def add(self, clip_digest: bytes, encoded: EncodedTarget) -> None:
        """Keeps a copy of a target."""
        scale = None if encoded.scale is None else bytes(encoded.scale)
        copy = EncodedTarget(target=bytes(encoded.target), scale=scale, checksum=encoded.checksum)
        with self._lock:
            at_stake = self._store.num_open + 1
            try:
                self._store.add({clip_digest: copy})
            except (OSError, ValueError) as error:
                self._lost(at_stake, error)

    def counters(self) -> dict[str, int]:
        """What it had, lacked, and could not keep."""
        with self._lock:
            corrupt = self._counters["cache_corrupt"] + self._store.num_left_out
            return {**self._counters, "cache_corrupt": corrupt}

    def close(self) -> None:
        """Writes what is not yet written."""
        with self._lock:
            at_stake = self._store.num_open
            try:
                self._store.close()
            except (OSError, ValueError) as error:
                self._lost(at_stake, error)

    def _lost(self, num_targets: int, error: OSError | ValueError) -> None:
        self._counters["cache_not_written"] += num_targets
        logger.error("the target cache lost %d targets, and training goes on: %s", num_targets, error)
