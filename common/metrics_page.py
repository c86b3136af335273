"""docs/metrics.md, made from the records: ``python -m salt_distill.common.metrics_page`` writes it."""

from salt_distill.common.metrics import SERVICE, Metric
from salt_distill.common.metrics_line import STUDENT
from salt_distill.common.protocol import RUN_METRICS

_PAGE = """# Metrics

Written by `python -m salt_distill.common.metrics_page`; a test says whether it is up to date.
`deploy/prometheus.yml` scrapes them, `deploy/grafana-dashboard.json`
shows them.

## The service: `GET /metrics`

Sums over all replicas, whichever answers; what replicas did that have ended stays in the counters.

{service}
One sample for each run on the board:

{runs}
## A student: `salt-train ... --metrics-port PORT`

`http://HOST:PORT/metrics` of the run's first worker: the newest line of `metrics.jsonl`, a mean over
`log_every` steps.

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
