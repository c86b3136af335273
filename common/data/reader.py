"""Slots -> clips: reads, decodes, cuts."""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from common.clip import ClipBatch, clip_digest
from common.config import LoaderConfig, ViewConfig, Views
from common.data import views as view_of
from common.data.order import Order
from common.data.shards import Sample, open_dataset
from common.data.video import BadVideoError, decode, decoder_name

CENTRE_VIEW = -1
"""The view number of evaluation clips, which draws nothing."""


class Reader:
    """The clips of a data set, as a pure function of their slots: no state of a Reader changes what it returns. Thread safe."""

    def __init__(self, data: str, *, data_seed: int, views: Views, view: ViewConfig, split: str, loader: LoaderConfig) -> None:
        """``data``: a folder of shards. Raises FileNotFoundError or ValueError where it is none, or has no such split."""
        self.dataset = open_dataset(data)
        self.samples = self.dataset.samples(split)
        """For each shard its samples of the split."""
        self.order = Order([len(shard) for shard in self.samples], data_seed, loader.shuffle_shards)
        self.num_samples = self.order.num_samples
        self.index_hash = self.dataset.index_hash
        self.decoder = decoder_name()
        self.skipped: dict[str, str] = {}
        """Key -> reason, of every video that failed so far."""
        self._data_seed, self._view = data_seed, view
        self._views: Views = views
        self._max_bad_fraction = loader.max_bad_fraction
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._cache = FrameCache(loader.frame_cache_bytes)
        self._pool = ThreadPoolExecutor(loader.decode_threads, thread_name_prefix="decode")

    def clips(self, slots: Sequence[int]) -> ClipBatch:
        """The clips of these slots, in order. A video that cannot be decoded is a row of zeros with ``good`` False, named in ``skipped``.

        Raises ValueError when more than ``loader.max_bad_fraction`` of the clips so far (counted as at least 100) were bad.
        """
        epochs, shard_idx, sample_idx = zip(*(self.order.locate(slot) for slot in slots), strict=True)
        samples = [self.samples[shard][place] for shard, place in zip(shard_idx, sample_idx, strict=True)]
        return self._batch(samples, [view_of.view_number(self._views, epoch) for epoch in epochs])

    def evaluation(self, samples: Sequence[Sample]) -> ClipBatch:
        """The centre view of each sample: middle frames, largest centred square, no flip. Bad videos as in ``clips``."""
        return self._batch(samples, [CENTRE_VIEW] * len(samples))

    def clip_of(self, sample: Sample, view_number: int) -> tuple[UInt8[np.ndarray, "t h w 3"], bytes]:
        """One view of one sample, and its digest. Raises BadVideoError."""
        if view_number == CENTRE_VIEW:
            view, draw = view_of.evaluation_view(self._view), view_of.CENTRE
        else:
            view, draw = self._view, view_of.draw(self._data_seed, sample.key, view_number)
        frames = self._frames(sample, view_of.frame_idx(view, sample.num_frames, draw.start))
        pixels = view_of.apply(view, frames, draw)
        return pixels, clip_digest(pixels)

    def close(self) -> None:
        """Ends the decode threads."""
        self._pool.shutdown(cancel_futures=True)

    def _batch(self, samples: Sequence[Sample], views: Sequence[int]) -> ClipBatch:
        pixels = np.zeros((len(samples), *self._view.clip_shape), np.uint8)
        good = np.ones(len(samples), bool)

        def fill(row: int) -> bytes:
            try:
                pixels[row], digest = self.clip_of(samples[row], views[row])
            except BadVideoError as error:
                good[row] = False
                self.skipped[samples[row].key] = str(error)
                return clip_digest(pixels[row])
            return digest

        digests = tuple(self._pool.map(fill, range(len(samples))))
        self._check_bad(num_clips=len(samples), num_bad=int((~good).sum()))
        return ClipBatch(pixels=pixels, digests=digests, keys=tuple(sample.key for sample in samples), views=tuple(views), good=good)

    def _frames(self, sample: Sample, frame_idx: list[int]) -> np.ndarray:
        cached = self._cache.get(sample.key)
        if cached is not None:
            return cached[frame_idx]
        if not self._cache.has_room(sample.num_frames * sample.height * sample.width * 3):
            return decode(self.dataset.read(sample), frame_idx)
        frames = decode(self.dataset.read(sample), range(sample.num_frames))
        self._cache.put(sample.key, frames)
        return frames[frame_idx]

    def _check_bad(self, *, num_clips: int, num_bad: int) -> None:
        with self._counts_lock:
            self._counts.update(clips=num_clips, bad=num_bad)
            clips, bad = self._counts["clips"], self._counts["bad"]
        if num_bad and bad > self._max_bad_fraction * max(clips, 100):
            key, reason = next(iter(self.skipped.items()))
            raise ValueError(
                f"got {bad} clips that cannot be decoded among {clips}, expected at most loader.max_bad_fraction="
                f"{self._max_bad_fraction:g} of them; {len(self.skipped)} videos are bad, the first is {key}: {reason}"
            )


class FrameCache:
    """Decoded videos, kept until ``max_bytes`` are full; nothing is ever evicted.

    A pass takes every sample once, so the one that was used longest ago is the one needed next: evicting it would make a cache that is
    a little too small useless, while keeping the first that came serves their share of every pass.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._videos: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> np.ndarray | None:
        """The frames of a video, or None."""
        return self._videos.get(key)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a video of this size could be kept now."""
        return num_bytes <= self._room

    def put(self, key: str, frames: np.ndarray) -> None:
        """Keeps a video, if it still fits."""
        with self._lock:
            if key not in self._videos and frames.nbytes <= self._room:
                self._videos[key] = frames
                self._room -= frames.nbytes
