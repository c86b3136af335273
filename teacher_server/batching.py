"""Clips to encoded targets, each distinct clip once: coalescing, batches, one forward at a time. Pure asyncio."""

import asyncio
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import Buffer

from common.config import TargetDtype
from common.model.teacher import TeacherSpec
from common.targets import codec
from common.targets.codec import EncodedTarget
from teacher_server.memory import TargetMemory


class FrozenTeacher(Protocol):
    """What the service needs of ``common.model.teacher.Teacher``."""

    spec: TeacherSpec

    def forward(self, clips: UInt8[np.ndarray, "b t h w 3"]) -> Float[Tensor, "b n d"]: ...


class BusyError(RuntimeError):
    """More clips are on their way to the teacher than it takes."""


@dataclass
class Counters:
    """What a service has done since it started. ``clips_served = clips_computed + coalesced + from_memory``, if no client leaves early."""

    clips_served: int = 0
    """Targets sent."""
    clips_computed: int = 0
    """Clips that went through the teacher."""
    coalesced: int = 0
    """Targets sent that another request had already begun."""
    from_memory: int = 0
    """Targets sent that were in memory."""
    need_clip: int = 0
    """Rows answered with a request for the clip's bytes."""
    refused: int = 0
    """Rows answered bad_digest or bad_shape."""
    requests: int = 0
    """Requests for targets."""
    busy: int = 0
    """Requests answered 429."""
    bytes_in: int = 0
    """Bytes of request bodies."""
    bytes_out: int = 0
    """Bytes of response bodies."""
    forwards: int = 0
    """Teacher forwards, the padded ones too."""
    batch_fill: float = 0.0
    """Clips per forward, over the batch size."""
    forward_s: float = 0.0
    """Seconds in the teacher's forward."""

    def to_json(self) -> dict[str, int | float]:
        """Plain types."""
        return asdict(self)


@dataclass(eq=False)
class Flight:
    """A clip on its way through the teacher. It belongs to the batcher: whoever waits for it may leave."""

    clip_digest: bytes
    clip: Buffer
    run: str
    """The student run that brought it."""
    queued_s: float
    """When it came, on the event loop's clock."""
    results: dict[TargetDtype, asyncio.Future[EncodedTarget]] = field(default_factory=dict)
    """One for each rounding that somebody waits for."""

    def result(self, dtype: TargetDtype) -> asyncio.Future[EncodedTarget]:
        """The target to come. Await it shielded, so that leaving does not take it from the others."""
        if dtype not in self.results:
            self.results[dtype] = asyncio.get_running_loop().create_future()
        return self.results[dtype]

    def waits_for(self, dtype: TargetDtype) -> bool:
        """Whether a rounding was asked for that is not there yet."""
        return dtype in self.results and not self.results[dtype].done()


class Batcher:
    """The teacher behind a queue."""

    def __init__(self, teacher: FrozenTeacher, *, batch_size: int, batch_wait_s: float, memory_bytes: int, max_pending_bytes: int) -> None:
        self._teacher, self._batch_size, self._batch_wait_s = teacher, batch_size, batch_wait_s
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        self._queue: deque[Flight] = deque()
        self._queued = asyncio.Event()
        self._flights: dict[bytes, Flight] = {}
        self._deliveries: set[asyncio.Task[None]] = set()
        self._forward_thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")  # one: a device does one forward at a time
        self._encode_thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self.memory = TargetMemory(memory_bytes)
        self.counters = Counters()

    async def run(self) -> None:
        """Takes batches from the queue until it is cancelled; closes the threads then."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = await self._next_batch()
                started = loop.time()
                forward = loop.run_in_executor(self._forward_thread, self._forward, [flight.clip for flight in batch])
                delivery = asyncio.create_task(self._deliver(batch, forward))  # the next forward overlaps this one's encoding
                self._deliveries.add(delivery)
                delivery.add_done_callback(lambda done, batch=batch: self._delivered(batch, done))
                await asyncio.wait([forward])  # waits for its end, whether it succeeds or not
                self.counters.forward_s += loop.time() - started
        finally:
            self._forward_thread.shutdown(wait=False, cancel_futures=True)
            self._encode_thread.shutdown(wait=False, cancel_futures=True)

    async def warm_up(self) -> None:
        """One forward of an empty clip, so that the first student does not wait for the libraries."""
        clip = bytes(math.prod(self._teacher.spec.clip_shape))
        await asyncio.get_running_loop().run_in_executor(self._forward_thread, self._forward, [clip])

    @contextmanager
    def admit(self, num_bytes: int) -> Iterator[None]:
        """Holds room for a request body while it is read. Raises BusyError where there is none; an idle teacher takes any body."""
        if self._pending_bytes and self._pending_bytes + num_bytes > self._max_pending_bytes:
            self.counters.busy += 1
            raise BusyError(f"{self._pending_bytes} bytes of clips wait for the teacher, at most {self._max_pending_bytes} may")
        self._pending_bytes += num_bytes
        try:
            yield
        finally:
            self._pending_bytes -= num_bytes

    def flight(self, clip_digest: bytes) -> Flight | None:
        """The clip, where it is on its way."""
        return self._flights.get(clip_digest)

    def submit(self, clip_digest: bytes, clip: Buffer, run: str) -> Flight:
        """Puts a clip on its way. Its digest has been checked."""
        assert clip_digest not in self._flights, "a clip is on its way once"
        flight = Flight(clip_digest=clip_digest, clip=clip, run=run, queued_s=asyncio.get_running_loop().time())
        self._flights[clip_digest] = flight
        self._pending_bytes += memoryview(clip).nbytes
        self._queue.append(flight)
        self._queued.set()
        return flight

    @property
    def queued_clips(self) -> int:
        """Clips that wait for a forward."""
        return len(self._queue)

    async def _next_batch(self) -> list[Flight]:
        while not self._queue:
            self._queued.clear()
            await self._queued.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._queue[0].queued_s + self._batch_wait_s):
                while len(self._queue) < self._batch_size:
                    self._queued.clear()
                    await self._queued.wait()
        return [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]

    def _forward(self, clips: Sequence[Buffer]) -> Float[Tensor, "b n d"]:
        shape = self._teacher.spec.clip_shape
        return self._teacher.forward(np.stack([np.frombuffer(memoryview(clip), dtype=np.uint8).reshape(shape) for clip in clips]))

    async def _deliver(self, batch: list[Flight], forward: asyncio.Future[Tensor]) -> None:
        try:
            targets = await forward
            self.counters.forwards += 1
            self.counters.clips_computed += len(batch)
            self.counters.batch_fill = self.counters.clips_computed / (self.counters.forwards * self._batch_size)
            # While one rounding is encoded another may be asked for. No await stands between the last look and the end of the flights.
            while (dtype := _missing(batch)) is not None:
                await self._encode(batch, targets, dtype)
        finally:
            for flight in batch:
                del self._flights[flight.clip_digest]
                self._pending_bytes -= memoryview(flight.clip).nbytes

    async def _encode(self, batch: list[Flight], targets: Float[Tensor, "b n d"], dtype: TargetDtype) -> None:
        rows = [row for row, flight in enumerate(batch) if flight.waits_for(dtype)]
        encoded = await asyncio.get_running_loop().run_in_executor(self._encode_thread, codec.encode, targets[rows], dtype)
        for row, target in zip(rows, encoded, strict=True):
            self.memory.put(batch[row].clip_digest, dtype, target)
            batch[row].results[dtype].set_result(target)

    def _delivered(self, batch: list[Flight], delivery: asyncio.Task[None]) -> None:
        """Tells those who wait that the teacher failed, where it did."""
        self._deliveries.discard(delivery)
        error = None if delivery.cancelled() else delivery.exception()
        for result in (result for flight in batch for result in flight.results.values() if not result.done()):
            if error is None:
                result.cancel()
            else:
                result.set_exception(error)


def _missing(batch: list[Flight]) -> TargetDtype | None:
    """A rounding that somebody still waits for."""
    for dtype in codec.TARGET_DTYPES:
        if any(flight.waits_for(dtype) for flight in batch):
            return dtype
    return None
