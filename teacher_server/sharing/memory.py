"""Encoded targets in memory."""

from collections import OrderedDict

from salt_distill.common.config import TargetDtype
from salt_distill.common.targets.codec import EncodedTarget


class TargetMemory:
    """The newest targets, up to a number of bytes: what student runs that follow each other by seconds share.

    The oldest goes first, however lately it was used. Runs take clips in one order: to keep what the run
    ahead and the one behind both have had would cost the room of what the one behind comes to next.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._targets: OrderedDict[tuple[bytes, TargetDtype], EncodedTarget] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._targets)

    def __contains__(self, key: tuple[bytes, TargetDtype]) -> bool:
        return key in self._targets

    def clip_digests(self) -> list[bytes]:
        """The clips of which it has targets, the oldest first."""
        return list(dict.fromkeys(digest for digest, _ in self._targets))

    def get(self, clip_digest: bytes, dtype: TargetDtype) -> EncodedTarget | None:
        """The target or None."""
        return self._targets.get((clip_digest, dtype))

    def put(self, clip_digest: bytes, dtype: TargetDtype, encoded: EncodedTarget) -> None:
        """Keeps a target; the oldest make room for it."""
        if (clip_digest, dtype) in self._targets:  # computed while it was read from disk: the same bytes
            return
        self._targets[clip_digest, dtype] = encoded
        self.num_bytes += encoded.num_bytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._targets.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
