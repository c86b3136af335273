"""``GET /metrics``: the counters of all replicas, and the runs on the board, as Prometheus reads them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family

from salt_distill.common.metrics import BOUNDS_S, SERVICE, Metric
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.protocol import RUN_METRICS

Counters = Mapping[str, int | float]
_WHOLE = re.compile(rb" (\d+)\.0\n")
"""A count, which the library writes as a float."""


def exposition(spec: TeacherSpec, counters: Counters, runs: Sequence[dict[str, Any]]) -> bytes:
    """The text. ``counters``: sums over replicas, as ``Counters.to_json`` names them."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot([_info(spec), *_of_service(counters), *_of_runs(runs)]))
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


def _of_service(counters: Counters) -> Iterator[Family]:
    for metric in SERVICE:
        if metric.kind == "histogram":
            yield _histogram(metric, counters)
            continue
        family = _family(metric)
        if not metric.labels:
            family.add_metric([], counters.get(metric.of, 0))
        for name, value in counters.items():
            of, *labels = name.split("|")
            if of == metric.of and len(labels) == len(metric.labels) > 0:
                family.add_metric(labels, value)
        yield family


def _histogram(metric: Metric, counters: Counters) -> Family:
    family, total, buckets = HistogramMetricFamily(metric.name, metric.help), 0.0, []
    for bound in [*map(str, BOUNDS_S), "inf"]:
        total += counters.get(f"{metric.of}|{bound}", 0)
        buckets.append(("+Inf" if bound == "inf" else bound, total))
    family.add_metric([], buckets, counters.get(f"{metric.of}|sum", 0.0))
    return family


def _of_runs(runs: Sequence[dict[str, Any]]) -> Iterator[Family]:
    for metric in RUN_METRICS:
        family = _family(metric)
        for run in runs:
            value = {**(run["progress"] or {}), **run}.get(metric.of)
            if value is not None:
                family.add_metric([run["id"]], value)
        yield family


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(metric.name, metric.help, labels=metric.labels)
