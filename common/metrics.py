"""What Prometheus reads: marks that make a field of a record a metric, and the records of a service. Our own,
since these are sums over replicas on several machines, which JSON and the page show too; the usual library
counts in one process."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of a histogram's buckets, in seconds; the last bucket has none."""

Kind = Literal["counter", "gauge", "histogram"]
"""A counter only grows; a gauge says how things are now, and means nothing after its process's end."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric."""

    name: str
    """As Prometheus shows it, without what it appends (`_bucket`, `_sum`, `_count`)."""
    kind: Kind
    unit: str
    help: str
    of: str
    """The field that it is made from."""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Makes the field that it annotates a metric, whose help is the field's docstring."""

    kind: Kind
    unit: str
    name: str | None
    """The metric's; None: the field's."""
    labels: tuple[str, ...] = ()
    is_shared: bool = False
    """All replicas hold the same, so over them it is the largest, not the sum."""


def counter(unit: str, *, name: str | None = None, labels: tuple[str, ...] = ()) -> Mark:
    """What only grows."""
    return Mark(kind="counter", unit=unit, name=name, labels=labels)


def gauge(unit: str, *, name: str | None = None, is_shared: bool = False) -> Mark:
    """How things are now."""
    return Mark(kind="gauge", unit=unit, name=name, is_shared=is_shared)


def metrics_of(
    record: type[BaseModel], *, prefix: str = "", labels: tuple[str, ...] = ()
) -> tuple[Metric, ...]:
    """The marked fields of a record, in its order. ``labels``: of all of them, beside their own."""
    metrics = []
    for field, info in record.model_fields.items():
        for mark in (item for item in info.metadata if isinstance(item, Mark)):
            ending = {"counter": "_total", "gauge": "", "histogram": "_seconds"}[mark.kind]
            name = f"salt_{prefix}{mark.name or field}{ending}"
            help_ = " ".join((info.description or "").split()).removesuffix(".")
            metrics.append(
                Metric(
                    name=name,
                    kind=mark.kind,
                    unit=mark.unit,
                    help=help_,
                    of=field,
                    labels=(*labels, *mark.labels),
                )
            )
    return tuple(metrics)


class Histogram(BaseModel):
    """How often a time fell between two bounds."""

    counts: list[int] = Field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    """By bucket: of ``BOUNDS_S``, and the one above them."""
    sum_s: float = 0.0
    """Of the times."""

    def observe(self, seconds: float) -> None:
        """Counts a time."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def add(self, other: "Histogram") -> None:
        """Adds what another one has counted."""
        self.counts = [mine + others for mine, others in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s


_TIMES = Mark(kind="histogram", unit="seconds", name=None)


class ServiceCounters(BaseModel):
    """What a service has done since it started and holds now: the numbers that people read.

    ``clips_served = clips_computed + coalesced + from_memory + from_disk``, if no client leaves early.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    requests: int = 0
    """Requests for targets whose bodies were whole."""
    clips_served: Annotated[int, counter("targets")] = 0
    """Targets sent: the sum of computed, coalesced, from memory and from disk, unless a client left early."""
    clips_computed: Annotated[int, counter("clips")] = 0
    """Clips that the teacher computed."""
    coalesced: Annotated[int, counter("targets")] = 0
    """Targets sent whose computation another request had already started."""
    from_memory: Annotated[int, counter("targets")] = 0
    """Targets sent that the service still had in memory."""
    from_disk: Annotated[int, counter("targets")] = 0
    """Targets sent that were read from the cache on disk."""
    shared: Annotated[int, counter("targets")] = 0
    """Targets sent that another run had asked for before; its own earlier requests do not count."""
    passed_on: Annotated[int, counter("rows")] = 0
    """Rows that were fetched from another replica, which keeps the targets of their clips."""
    need_clip: Annotated[int, counter("rows")] = 0
    """Rows answered `need_clip`: the client is to upload the clip."""
    refused: Annotated[int, counter("rows")] = 0
    """Rows answered `bad_digest` or `bad_shape`."""
    busy: Annotated[int, counter("requests")] = 0
    """Requests answered 429, because the service was full."""
    expired: Annotated[int, counter("requests")] = 0
    """Requests answered 504, because their deadline had passed."""
    abandoned: Annotated[int, counter("clips")] = 0
    """Clips that were not computed, because every client that waited for them had left."""
    retries_seen: Annotated[int, counter("requests")] = 0
    """Requests that their clients say are repeated ones."""
    bytes_in: Annotated[int, counter("bytes")] = 0
    """Size of the requests for targets."""
    bytes_out: Annotated[int, counter("bytes")] = 0
    """Size of the answers to them."""
    forwards: Annotated[int, counter("forwards")] = 0
    """Forwards of the teacher, those of batches that were not full too."""
    forward_s: float = 0.0
    """Seconds in the teacher's forward."""
    forwards_hung: Annotated[int, counter("forwards")] = 0
    """Forwards that took longer than `service.forward_timeout_s`; their replica is replaced."""
    replicas_lost: Annotated[int, counter("replicas")] = 0
    """Replicas that stopped answering or sent a broken answer, without having been told to end."""
    disk_not_written: Annotated[int, counter("targets")] = 0
    """Targets that were not written to the cache on disk, because it was too slow or failed."""
    disk_not_read: Annotated[int, counter("clips")] = 0
    """Clips that were computed without a look at the cache on disk, because it did not answer."""
    disk_corrupt: Annotated[int, counter("targets")] = 0
    """Targets that were damaged on disk; they were computed again."""
    board_not_written: Annotated[int, counter("lines")] = 0
    """Lines that could not be written to the board's file."""
    board_corrupt: Annotated[int, counter("lines")] = 0
    """Lines of the board's file that were damaged, and left out."""
    batch_fill: Annotated[float, gauge("ratio")] = 0.0
    """Mean share of a forward's batch that held clips."""
    queued_clips: Annotated[int, gauge("clips")] = 0
    """Clips that wait for a forward now."""
    open_requests: Annotated[int, gauge("requests")] = 0
    """Requests for targets that are being answered now."""
    leases: Annotated[int, gauge("clips")] = 0
    """Clips that a client has been asked to upload."""
    memory_clips: Annotated[int, gauge("targets")] = 0
    """Targets in memory."""
    memory_bytes: Annotated[int, gauge("bytes")] = 0
    """Size of the targets in memory."""
    disk_clips: Annotated[int, gauge("targets", is_shared=True)] = 0
    """Targets in the cache on disk; one that replicas share is counted once."""
    replicas: Annotated[int, gauge("replicas")] = 0
    """Replicas that belong to the service, those that drain too; at least 1."""
    draining: Annotated[int, gauge("replicas")] = 0
    """Replicas that only finish the requests that they have."""


class ServiceMetrics(ServiceCounters):
    """All that a replica counts: what people read, and what only Prometheus does. Adds up over replicas."""

    answers: Annotated[
        dict[str, dict[int, int]], counter("requests", name="requests", labels=("route", "code"))
    ] = Field(default_factory=dict)
    """Requests answered, by route and HTTP status; 499: the client left."""
    queue_wait: Annotated[Histogram, _TIMES] = Field(default_factory=Histogram)
    """Time that a clip waited for its forward."""
    forward: Annotated[Histogram, _TIMES] = Field(default_factory=Histogram)
    """Time of a forward of one batch."""
    serialise: Annotated[Histogram, _TIMES] = Field(default_factory=Histogram)
    """Time to write an answer's bytes."""
    request: Annotated[Histogram, _TIMES] = Field(default_factory=Histogram)
    """Time of a request for targets, from its first byte to the last byte of the answer."""

    def add(self, other: "ServiceMetrics") -> None:
        """Adds what another replica has done and holds."""
        for name, info in ServiceMetrics.model_fields.items():
            mine, others = getattr(self, name), getattr(other, name)
            if isinstance(mine, Histogram):
                mine.add(others)
            elif not isinstance(mine, dict):
                is_shared = any(isinstance(mark, Mark) and mark.is_shared for mark in info.metadata)
                setattr(self, name, max(mine, others) if is_shared else mine + others)
        for route, statuses in other.answers.items():
            counts = self.answers.setdefault(route, {})
            for status, count in statuses.items():
                counts[status] = counts.get(status, 0) + count

    def lasting(self) -> "ServiceMetrics":
        """A copy of what stays true of a replica that has ended: no gauges."""
        gauges = {
            name
            for name, info in ServiceMetrics.model_fields.items()
            if any(isinstance(mark, Mark) and mark.kind == "gauge" for mark in info.metadata)
        }
        return ServiceMetrics.model_validate(self.model_dump(exclude=gauges))

    def count_answer(self, route: str, status: int, *, is_retry: bool) -> None:
        """Counts a request of any route."""
        counts = self.answers.setdefault(route, {})
        counts[status] = counts.get(status, 0) + 1
        self.retries_seen += is_retry


SERVICE = metrics_of(ServiceMetrics)
"""Sums over all replicas, whichever answers."""
