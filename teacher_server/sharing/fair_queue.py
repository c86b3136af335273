"""Clips that wait for the teacher, taken from the student runs in turn."""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """What the queue needs of a clip."""

    run: str
    queued_s: float


Q = TypeVar("Q", bound=Queued)


class FairQueue(Generic[Q]):
    """Deficit round robin over runs. A turn is one clip, and clips cost the same, so no run ever has a
    deficit to carry.

    A run that asks for more than its share waits for itself; a run that joins is served within one round.
    """

    def __init__(self) -> None:
        self._runs: OrderedDict[str, OrderedDict[int, Q]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(clips) for clips in self._runs.values())

    def put(self, clip: Q) -> None:
        """Adds a clip, charged to the run that brought it."""
        self._runs.setdefault(clip.run, OrderedDict())[id(clip)] = clip

    def drop(self, clip: Q) -> bool:
        """Takes a clip out of its turn; False where it does not wait any more."""
        clips = self._runs.get(clip.run, OrderedDict())
        if clips.pop(id(clip), None) is None:
            return False
        if not clips:
            del self._runs[clip.run]
        return True

    def oldest_s(self) -> float:
        """When the clip that waits longest came."""
        return min(next(iter(clips.values())).queued_s for clips in self._runs.values())

    def take(self, count: int) -> list[Q]:
        """Up to ``count`` clips, one of each run in turn; the next call goes on with the next run."""
        taken = []
        while self._runs and len(taken) < count:
            run, clips = self._runs.popitem(last=False)
            taken.append(clips.popitem(last=False)[1])
            if clips:
                self._runs[run] = clips
        return taken
