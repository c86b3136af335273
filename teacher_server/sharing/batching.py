"""Clips to encoded targets, each distinct clip once: coalescing, fair batches, one forward at a time. Pure
asyncio."""

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import Buffer

from salt_distill.common.config import TargetDtype
from salt_distill.common.metrics import ServiceMetrics
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.targets import codec
from salt_distill.common.targets.codec import EncodedTarget
from salt_distill.teacher_server.sharing.disk import DiskTargets
from salt_distill.teacher_server.sharing.fair_queue import FairQueue
from salt_distill.teacher_server.sharing.memory import TargetMemory
from salt_distill.teacher_server.sharing.room import Share


class FrozenTeacher(Protocol):
    """What the service needs of ``salt_distill.common.model.teacher.Teacher``."""

    spec: TeacherSpec

    def forward(self, clips: UInt8[np.ndarray, "b t h w 3"]) -> Float[Tensor, "b n d"]: ...


class HangError(RuntimeError):
    """The teacher does not come back from a forward."""


@dataclass(eq=False)
class PendingClip:
    """A clip on its way through the teacher. It belongs to the batcher: whoever waits for it may leave."""

    clip_digest: bytes
    clip: Buffer
    share: Share
    """Of whom brought it."""
    queued_s: float
    """When it came, on the event loop's clock."""
    num_waiting: int = 0
    """Requests that wait for it."""
    results: dict[TargetDtype, asyncio.Future[EncodedTarget]] = field(default_factory=dict)
    """One for each rounding that somebody waits for."""

    def result(self, dtype: TargetDtype) -> asyncio.Future[EncodedTarget]:
        """The target to come. Await it shielded, so that leaving does not take it from the others, inside
        ``Batcher.waiting``."""
        if dtype not in self.results:
            self.results[dtype] = asyncio.get_running_loop().create_future()
        return self.results[dtype]

    def waits_for(self, dtype: TargetDtype) -> bool:
        """Whether a rounding was asked for that is not there yet."""
        return dtype in self.results and not self.results[dtype].done()


class Batcher:
    """The teacher behind a queue."""

    def __init__(
        self,
        teacher: FrozenTeacher,
        *,
        batch_size: int,
        batch_wait_s: float,
        memory_bytes: int,
        disk: DiskTargets | None,
        forward_timeout_s: float,
    ) -> None:
        self._forward_timeout_s = forward_timeout_s
        self._forward_since_s: float | None = None
        self._hung_since_s: float | None = None
        """When the forward began that was last found to hang."""
        self._teacher, self._batch_size, self._batch_wait_s = teacher, batch_size, batch_wait_s
        self._queue: FairQueue[PendingClip] = FairQueue()
        self._queued = asyncio.Event()
        self._pending: dict[bytes, PendingClip] = {}
        self._deliveries: set[asyncio.Task[None]] = set()
        self._forward_thread = ThreadPoolExecutor(
            1, thread_name_prefix="teacher"
        )  # one: a device does one forward at a time
        self._encode_thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._disk = disk
        self.memory = TargetMemory(memory_bytes)
        self.counters = ServiceMetrics()

    async def run(self) -> None:
        """Takes batches from the queue until it is cancelled; closes the threads then."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = await self._next_batch()
                started, self._forward_since_s = loop.time(), time.monotonic()
                for pending in batch:
                    self.counters.queue_wait.observe(started - pending.queued_s)
                forward = loop.run_in_executor(
                    self._forward_thread, self._forward, [pending.clip for pending in batch]
                )
                delivery = asyncio.create_task(
                    self._deliver(batch, forward)
                )  # the next forward overlaps this one's encoding
                self._deliveries.add(delivery)
                delivery.add_done_callback(lambda done, batch=batch: self._delivered(batch, done))
                await asyncio.wait([forward])  # waits for its end, whether it succeeds or not
                self._forward_since_s = None
                self.counters.forward_s += loop.time() - started
                self.counters.forward.observe(loop.time() - started)
        finally:
            self._forward_thread.shutdown(wait=False, cancel_futures=True)
            self._encode_thread.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """Raises HangError where a forward takes too long. From any thread: Ray Serve asks from one of its
        own."""
        since_s = self._forward_since_s
        if since_s is None:
            return
        taken_s = time.monotonic() - since_s
        if taken_s > self._forward_timeout_s:
            if self._hung_since_s != since_s:  # asked again and again of one forward
                self._hung_since_s = since_s
                self.counters.forwards_hung += 1
            raise HangError(
                f"a forward has not ended after {taken_s:.1f} s, and service.forward_timeout_s is"
                f" {self._forward_timeout_s:g}"
            )

    async def warm_up(self) -> None:
        """One forward of an empty clip, so that the first student does not wait for the libraries."""
        clip = bytes(math.prod(self._teacher.spec.clip_shape))
        await asyncio.get_running_loop().run_in_executor(self._forward_thread, self._forward, [clip])

    def pending_clip(self, clip_digest: bytes) -> PendingClip | None:
        """The clip, where it is on its way."""
        return self._pending.get(clip_digest)

    def submit(self, clip_digest: bytes, clip: Buffer, share: Share) -> PendingClip:
        """Puts a clip on its way. Its digest has been checked."""
        assert clip_digest not in self._pending, "a clip is on its way once"
        pending = PendingClip(
            clip_digest=clip_digest, clip=clip, share=share, queued_s=asyncio.get_running_loop().time()
        )
        self._pending[clip_digest] = pending
        self._queue.put(pending)
        self._queued.set()
        return pending

    @contextmanager
    def waiting(self, pending: PendingClip) -> Iterator[None]:
        """Holds a place in line for a clip on its way. Whoever leaves, leaves it to the others; if there are
        none it costs no forward."""
        pending.num_waiting += 1
        try:
            yield
        finally:
            pending.num_waiting -= 1
            if pending.num_waiting == 0 and self._queue.drop(pending):
                self.counters.abandoned += 1
                del self._pending[pending.clip_digest]

    @property
    def queued_clips(self) -> int:
        """Clips that wait for a forward."""
        return len(self._queue)

    async def _next_batch(self) -> list[PendingClip]:
        while True:
            while not self._queue:
                self._queued.clear()
                await self._queued.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._queue.oldest_s() + self._batch_wait_s):
                    while 0 < len(self._queue) < self._batch_size:
                        self._queued.clear()
                        await self._queued.wait()
            if batch := self._queue.take(self._batch_size):  # none where those who waited have left
                return batch

    def _forward(self, clips: Sequence[Buffer]) -> Float[Tensor, "b n d"]:
        shape = self._teacher.spec.clip_shape
        return self._teacher.forward(
            np.stack([np.frombuffer(memoryview(clip), dtype=np.uint8).reshape(shape) for clip in clips])
        )

    async def _deliver(self, batch: list[PendingClip], forward: asyncio.Future[Tensor]) -> None:
        try:
            targets = await forward
            self.counters.forwards += 1
            self.counters.clips_computed += len(batch)
            self.counters.batch_fill = self.counters.clips_computed / (
                self.counters.forwards * self._batch_size
            )
            # While one rounding is encoded another may be asked for. No await stands between the last look
            # and the end of the pending clips.
            while (dtype := _missing(batch)) is not None:
                await self._encode(batch, targets, dtype)
        finally:
            for pending in batch:
                del self._pending[pending.clip_digest]

    async def _encode(
        self, batch: list[PendingClip], targets: Float[Tensor, "b n d"], dtype: TargetDtype
    ) -> None:
        rows = [row for row, pending in enumerate(batch) if pending.waits_for(dtype)]
        encoded = await asyncio.get_running_loop().run_in_executor(
            self._encode_thread, codec.encode, targets[rows], dtype
        )
        for row, target in zip(rows, encoded, strict=True):
            self.memory.put(batch[row].clip_digest, dtype, target)
            batch[row].results[dtype].set_result(target)
        if self._disk is not None:
            self._disk.put(
                dtype, {batch[row].clip_digest: target for row, target in zip(rows, encoded, strict=True)}
            )

    def _delivered(self, batch: list[PendingClip], delivery: asyncio.Task[None]) -> None:
        """Tells those who wait that the teacher failed, where it did."""
        self._deliveries.discard(delivery)
        error = None if delivery.cancelled() else delivery.exception()
        for result in (
            result for pending in batch for result in pending.results.values() if not result.done()
        ):
            if error is None:
                result.cancel()
            else:
                result.set_exception(error)


def _missing(batch: list[PendingClip]) -> TargetDtype | None:
    """A rounding that somebody still waits for."""
    for dtype in codec.TARGET_DTYPES:
        if any(pending.waits_for(dtype) for pending in batch):
            return dtype
    return None
