"""docs/metrics.md, made from the records: ``python -m salt_distill.common.metrics_page`` writes it."""

from salt_distill.common.metrics import SERVICE, Metric
from salt_distill.common.metrics_line import STUDENT
from salt_distill.common.protocol import RUN_METRICS

_PAGE = """# Metrics

The service and each student run publish numbers for [Prometheus](https://prometheus.io).
`deploy/prometheus.yml` collects them, and `deploy/grafana-dashboard.json` shows them in Grafana. A
*counter* only grows while the service runs. A *gauge* is the value of this moment. A *histogram* counts how
often a time fell into each of some ranges. Words such as target, forward and replica are in the
[glossary](glossary.md).

`python -m salt_distill.common.metrics_page` writes this page from the code.

## The service: `GET /metrics`

All numbers are sums over the [replicas](glossary.md#replica), whichever of them answers. Counters keep what
replicas that have ended did.

{service}
For each run on the [board](glossary.md#board), with the run's name as label:

{runs}
## A student: `salt-train ... --metrics-port PORT`

The first worker of the run answers `http://HOST:PORT/metrics` with the newest line of its `metrics.jsonl`.
Times, speeds and the loss are means over `log_every` steps. What a line does not have keeps its last value
here; before its first value it is NaN.

{student}"""


def page() -> str:
    """docs/metrics.md."""
    return _PAGE.format(service=_table(SERVICE), runs=_table(RUN_METRICS), student=_table(STUDENT))


def _table(metrics: tuple[Metric, ...]) -> str:
    lines = ["| metric | kind | unit | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        labels = "{" + ", ".join(metric.labels) + "}" if metric.labels else ""
        lines.append(f"| `{metric.name}{labels}` | {metric.kind} | {metric.unit} | {metric.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from pathlib import Path

    (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").write_text(page())
