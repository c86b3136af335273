"""Slots -> clips: reads, decodes, cuts."""

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from salt_distill.common.clip import BadVideoError, ClipBatch, clip_digest
from salt_distill.common.config import LoaderConfig, ViewConfig, Views
from salt_distill.common.data import views as view_of
from salt_distill.common.data.hold_out import hold_out
from salt_distill.common.data.order import Mixture
from salt_distill.common.data.pool import DecodePool
from salt_distill.common.data.sample import Sample, sha256_of
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.data.shard_cache import ShardCache
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.data.tasks import AllFrames, Clip, Cut, Decoder, Task
from salt_distill.common.data.video import decoder_name
from salt_distill.common.folders.slice import Slice

logger = logging.getLogger(__name__)

CENTRE_VIEW = -1
"""The view number of evaluation clips, which draws nothing."""
_READS_PER_PROCESS = 4
"""Videos that are read from a store, or wait for a decoding process, for each of them: what hides the store's
latency."""


class Reader:
    """The clips of a data set, as a pure function of their slots: no state of a Reader changes what it
    returns. Thread safe."""

    def __init__(
        self,
        data: str,
        *,
        data_seed: int,
        views: Views,
        view: ViewConfig,
        split: str,
        loader: LoaderConfig,
        num_held_out: int = 0,
    ) -> None:
        """``data``: a folder of shards or its URL. ``num_held_out``: samples that ``held_out`` is to name.
        Raises FileNotFoundError or ValueError where it is none, or has no such split."""
        self.dataset = open_dataset(data)
        self.held_out = hold_out(self.dataset, split, num_held_out) if num_held_out else None
        """Samples of no slot."""
        left_out = self.held_out.rows if self.held_out and self.held_out.is_from_training else ()
        self.samples = self.dataset.samples(split, but=left_out)
        """For each shard its samples of the split."""
        sources = self.dataset.sources
        weights = [source.weight for source in sources if source.weight is not None]
        self.order = Mixture(
            [len(shard) for shard in self.samples],
            self.dataset.shard_sources,
            [source.name for source in sources],
            weights or None,
            data_seed=data_seed,
            shuffle_shards=loader.shuffle_shards,
        )
        self.num_samples = self.order.num_samples
        self.index_hash = self.dataset.index_hash
        self.decoder = decoder_name()
        self.skipped: dict[str, str] = {}
        """Key -> reason, of every video that failed so far."""
        self._data_seed, self._view = data_seed, view
        self._views: Views = views
        self._max_bad_fraction = loader.max_bad_fraction
        self._counts = dict.fromkeys(("clips", "bad_clips", "shard_cache_hits", "shard_cache_misses"), 0)
        self._earlier_clips = self._earlier_bad = 0
        self._counts_lock = threading.Lock()
        self._frames = FrameCache(loader.frame_cache_bytes)
        self._read_once = (
            frozenset[str]() if self.held_out is None else frozenset(self.dataset.keys(self.held_out.rows))
        )
        self._videos = (
            None
            if loader.shard_cache_dir is None
            else ShardCache(loader.shard_cache_dir, loader.shard_cache_bytes)
        )
        self._pool = DecodePool(
            loader.decode_processes, timeout_s=loader.decode_timeout_s, call=Decoder(self.decoder)
        )
        self._threads = ThreadPoolExecutor(
            _READS_PER_PROCESS * max(1, loader.decode_processes), thread_name_prefix="read"
        )

    def clips(self, slots: Sequence[int]) -> ClipBatch:
        """The clips of these slots, in order. A video that cannot be decoded is a row of zeros with ``good``
        False, named in ``skipped``.

        Raises ValueError when more than ``loader.max_bad_fraction`` of the clips so far (counted as at least
        100) were bad.
        """
        passes, shard_idx, sample_idx = zip(*(self.order.locate(slot) for slot in slots), strict=True)
        rows = np.array(
            [self.samples[shard].rows[place] for shard, place in zip(shard_idx, sample_idx, strict=True)],
            np.int32,
        )
        samples, views = (
            self.dataset.take(rows),
            [view_of.view_number(self._views, number) for number in passes],
        )
        return self._batch(
            samples, [self._cut(sample, view) for sample, view in zip(samples, views, strict=True)], views
        )

    def evaluation(self, samples: Sequence[Sample]) -> ClipBatch:
        """The centre view of each sample: middle frames, largest centred crop, no flip. Bad videos as in
        ``clips``."""
        return self.view(samples, CENTRE_VIEW)

    def view(self, samples: Sequence[Sample], number: int) -> ClipBatch:
        """The view of this number of each sample. Bad videos as in ``clips``."""
        return self._batch(
            samples, [self._cut(sample, number) for sample in samples], [number] * len(samples)
        )

    def segments(self, samples: Sequence[Sample], cuts: Sequence[Cut | SegmentCut]) -> ClipBatch:
        """What each sample's own cut takes, all of one shape. Bad videos as in ``clips``."""
        return self._batch(samples, cuts, [CENTRE_VIEW] * len(samples))

    def submit(self, sample: Sample, view_number: int) -> Future[Clip]:
        """One view of one sample, and its digest, or BadVideoError."""
        return self._submit(sample, self._cut(sample, view_number))

    def _cut(self, sample: Sample, view_number: int) -> Cut | SegmentCut:
        if view_number == CENTRE_VIEW:
            return SegmentCut(self._view, num_segments=1, num_views=1, square=1.0)
        return Cut(self._view, view_of.draw(self._data_seed, sample.key, view_number))

    def _submit(self, sample: Sample, cut: Cut | SegmentCut) -> Future[Clip]:
        on_this_machine = self._videos is None and self.dataset.folder.local is not None
        if on_this_machine and not self._may_keep(sample):
            return self._pool.submit(
                Task(self.dataset.encoded(sample), sample.num_frames, cut, sample.seekable)
            )
        return self._threads.submit(self._clip, sample, cut)

    def close(self) -> None:
        """Ends threads and processes; what is not done yet is cancelled."""
        self.dataset.folder.close()
        self._pool.close()
        self._threads.shutdown(cancel_futures=True)

    def count_on(self, *, num_clips: int, num_bad: int) -> None:
        """Counts the clips of an earlier part of a run among those so far, for ``max_bad_fraction``."""
        with self._counts_lock:
            self._earlier_clips, self._earlier_bad = num_clips, num_bad

    def counters(self) -> dict[str, int]:
        """What is worth a look besides the clips."""
        with self._counts_lock:
            return self._counts | {"store_retries": self.dataset.folder.num_retries}

    def _batch(
        self, samples: Sequence[Sample], cuts: Sequence[Cut | SegmentCut], views: Sequence[int]
    ) -> ClipBatch:
        pixels = np.zeros((len(samples), *cuts[0].clip_shape), np.uint8)
        good = np.ones(len(samples), bool)
        digests = []
        pending = deque(self._submit(sample, cut) for sample, cut in zip(samples, cuts, strict=True))
        try:
            for row, sample in enumerate(samples):
                try:
                    pixels[row], digest = pending.popleft().result()
                except BadVideoError as error:
                    good[row] = False
                    if sample.key not in self.skipped:
                        logger.warning("%s is skipped: %s", sample.key, error)
                    self.skipped[sample.key] = str(error)
                    digest = clip_digest(pixels[row])
                digests.append(digest)
        finally:
            for future in pending:
                future.cancel()
        self._check_bad(num_clips=len(samples), num_bad=int((~good).sum()))
        return ClipBatch(
            pixels=pixels,
            digests=tuple(digests),
            keys=tuple(sample.key for sample in samples),
            views=tuple(views),
            good=good,
        )

    def _may_keep(self, sample: Sample) -> bool:
        if sample.key in self._read_once:
            return False
        return self._frames.get(sample.key) is not None or self._frames.has_room(_num_bytes(sample))

    def _clip(self, sample: Sample, cut: Cut | SegmentCut) -> Clip:
        """The clip, by a thread that may wait for a store, or that finds the video's frames in memory."""
        kept = self._frames.get(sample.key)
        if kept is None:
            encoded = self._encoded(sample)
            if not self._may_keep(sample):
                return self._pool.submit(Task(encoded, sample.num_frames, cut, sample.seekable)).result()
            kept = self._pool.submit(Task(encoded, sample.num_frames, None, sample.seekable)).result()
            self._frames.put(sample.key, kept)
        return cut.clip(kept.frames[cut.frame_idx(sample.num_frames, kept.times)])

    def _encoded(self, sample: Sample) -> Slice | bytes:
        """A sample's bytes, checked unless they are on this machine and stay where they are."""
        kept = None
        if self._videos is not None:
            kept = self._videos.get(sample.sha256)
            with self._counts_lock:
                self._counts["shard_cache_misses" if kept is None else "shard_cache_hits"] += 1
        if kept is not None:
            return kept
        encoded = self.dataset.encoded(sample)
        if isinstance(encoded, Slice):
            if self._videos is None:
                return encoded
            encoded = self._pool.submit(
                encoded
            ).result()  # a disk may not answer: that holds up a process which can be replaced, no thread
        require_sha256(encoded, sample)
        if self._videos is not None:
            self._videos.put(sample.sha256, encoded)
        return encoded

    def _check_bad(self, *, num_clips: int, num_bad: int) -> None:
        with self._counts_lock:
            self._counts["clips"] += num_clips
            self._counts["bad_clips"] += num_bad
            clips = self._earlier_clips + self._counts["clips"]
            bad = self._earlier_bad + self._counts["bad_clips"]
        if num_bad:
            require_few_bad(clips, bad, self.skipped, self._max_bad_fraction)


def too_many_bad(num_clips: int, num_bad: int, max_bad_fraction: float) -> bool:
    """Whether more than a share of the clips, counted as at least 100, were bad."""
    return num_bad > max_bad_fraction * max(num_clips, 100)


def require_few_bad(
    num_clips: int, num_bad: int, skipped: Mapping[str, str], max_bad_fraction: float
) -> None:
    """Raises ValueError where too many clips were bad. ``skipped``: key -> reason."""
    if too_many_bad(num_clips, num_bad, max_bad_fraction):
        key, reason = next(iter(skipped.items()))
        raise ValueError(
            f"got {num_bad} clips that cannot be decoded among {num_clips}, expected at most"
            f" loader.max_bad_fraction={max_bad_fraction:g} of them; {len(skipped)} videos are bad, the first"
            f" is {key}: {reason}"
        )


def _num_bytes(sample: Sample) -> int:
    """Of all its frames."""
    return sample.num_frames * sample.height * sample.width * 3


def require_sha256(data: bytes, sample: Sample) -> None:
    """Raises BadVideoError unless these are the bytes of a sample that were indexed."""
    if sha256_of(data) != sample.sha256:
        raise BadVideoError(
            f"its bytes in {sample.tar} are not those that were indexed, so the tar was replaced since"
        )


class FrameCache:
    """Decoded videos, kept until ``max_bytes`` are full; nothing is ever evicted.

    A pass takes every sample once, so the one that was used longest ago is the one needed next: evicting it
    would make a cache that is a little too small useless, while keeping the first that came serves their
    share of every pass.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._videos: dict[str, AllFrames] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> AllFrames | None:
        """The frames of a video, or None."""
        return self._videos.get(key)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a video of this size could be kept now."""
        return num_bytes <= self._room

    def put(self, key: str, video: AllFrames) -> None:
        """Keeps a video, if it still fits."""
        with self._lock:
            if key not in self._videos and video.frames.nbytes <= self._room:
                self._videos[key] = video
                self._room -= video.frames.nbytes
