"""Which run had a clip's target computed: what tells sharing between runs from a run's own earlier epochs."""

_MAX_CLIPS = 500_000
"""About 100 MB. Whose the older ones were is not known any more, and nothing is claimed of them."""


class Origins:
    """By clip the run that had its target computed, of the newest ones that were computed here."""

    def __init__(self, max_clips: int = _MAX_CLIPS) -> None:
        self._max_clips = max_clips
        self._runs: dict[bytes, str] = {}

    def add(self, clip_digest: bytes, run: str) -> None:
        """A run has a clip computed; one that memory had lost is from now on this run's."""
        self._runs.pop(clip_digest, None)
        self._runs[clip_digest] = run
        if len(self._runs) > self._max_clips:
            del self._runs[next(iter(self._runs))]

    def is_others(self, clip_digest: bytes, run: str) -> bool:
        """Whether it is known to be the work of another run than ``run``."""
        return self._runs.get(clip_digest, run) != run
