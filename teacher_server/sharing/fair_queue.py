"""Clips that wait for the teacher, taken from the tokens in turn, and of each token from its student runs in
turn."""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from salt_distill.teacher_server.sharing.room import Share


class Queued(Protocol):
    """What the queue needs of a clip."""

    share: Share
    queued_s: float


Q = TypeVar("Q", bound=Queued)


class FairQueue(Generic[Q]):
    """Deficit round robin over tokens, then over runs. A turn is one clip, and clips cost the same, so nobody
    ever has a deficit to carry.

    Who asks for more than its share waits for itself; who joins is served within one round. The ids of runs
    are the clients' choice, so that many of them are no larger share of the teacher than one.
    """

    def __init__(self) -> None:
        self._tokens: OrderedDict[str | None, OrderedDict[str, OrderedDict[int, Q]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(clips) for runs in self._tokens.values() for clips in runs.values())

    def put(self, clip: Q) -> None:
        """Adds a clip, charged to the run that brought it."""
        runs = self._tokens.setdefault(clip.share.token, OrderedDict())
        runs.setdefault(clip.share.run, OrderedDict())[id(clip)] = clip

    def drop(self, clip: Q) -> bool:
        """Takes a clip out of its turn; False where it does not wait any more."""
        runs = self._tokens.get(clip.share.token, OrderedDict())
        clips = runs.get(clip.share.run, OrderedDict())
        if clips.pop(id(clip), None) is None:
            return False
        if not clips:
            del runs[clip.share.run]
        if not runs:
            del self._tokens[clip.share.token]
        return True

    def oldest_s(self) -> float:
        """When the clip that waits longest came."""
        return min(
            next(iter(clips.values())).queued_s for runs in self._tokens.values() for clips in runs.values()
        )

    def take(self, count: int) -> list[Q]:
        """Up to ``count`` clips, one of each token in turn; the next call goes on with the next token."""
        taken = []
        while self._tokens and len(taken) < count:
            token, runs = self._tokens.popitem(last=False)
            run, clips = runs.popitem(last=False)
            taken.append(clips.popitem(last=False)[1])
            if clips:
                runs[run] = clips
            if runs:
                self._tokens[token] = runs
        return taken
