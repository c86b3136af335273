"""``GET /metrics``: the counters of all replicas, and the runs on the board, as Prometheus reads them."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family

from salt_distill.common.metrics import BOUNDS_S, SERVICE, Histogram, Metric, ServiceMetrics
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.protocol import RUN_METRICS, BoardRun

_WHOLE = re.compile(rb" (\d+)\.0\n")
"""A count, which the library writes as a float."""


def exposition(spec: TeacherSpec, metrics: ServiceMetrics, runs: Sequence[BoardRun]) -> bytes:
    """The text. ``metrics``: sums over replicas."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot([_info(spec), *_of_service(metrics), *_of_runs(runs)]))
    return _WHOLE.sub(rb" \1\n", generate_latest(registry))


class _Snapshot:
    """A collector of what was collected already: the numbers are the board's, not this process's."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Family]:
        return self._families


def _info(spec: TeacherSpec) -> Family:
    info = GaugeMetricFamily("salt_teacher_info", "Which teacher is served", labels=["name", "fingerprint"])
    info.add_metric([spec.name, spec.fingerprint], 1)
    return info


def _of_service(metrics: ServiceMetrics) -> Iterator[Family]:
    for metric in SERVICE:
        value = getattr(metrics, metric.of)
        if isinstance(value, Histogram):
            yield _histogram(metric, value)
            continue
        family = _family(metric)
        if isinstance(value, dict):
            for route, statuses in value.items():
                for status, count in statuses.items():
                    family.add_metric([route, str(status)], count)
        else:
            family.add_metric([], value)
        yield family


def _histogram(metric: Metric, histogram: Histogram) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help)
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    family.add_metric(
        [], list(zip(bounds, itertools.accumulate(histogram.counts), strict=True)), histogram.sum_s
    )
    return family


def _of_runs(runs: Sequence[BoardRun]) -> Iterator[Family]:
    for metric in RUN_METRICS:
        family = _family(metric)
        for run in runs:
            record = run if metric.of in BoardRun.model_fields else run.progress
            value = None if record is None else getattr(record, metric.of)
            if value is not None:
                family.add_metric([run.id], value)
        yield family


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(metric.name, metric.help, labels=metric.labels)
