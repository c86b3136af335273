"""Every Prometheus metric: its name, kind, unit and meaning. ``python -m salt_distill.common.metrics`` writes
docs/metrics.md from this."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric."""

    name: str
    """As Prometheus shows it, without what it appends (`_bucket`, `_sum`, `_count`)."""
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    of: str
    """What it is made from: a counter of the service, a value of a run on the board, or of a line of
    metrics.jsonl."""
    labels: tuple[str, ...] = ()


def _counter(name: str, unit: str, help: str, of: str | None = None, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(
        name=f"salt_{name}_total", kind="counter", unit=unit, help=help, of=of or name, labels=labels
    )


def _gauge(name: str, unit: str, help: str, of: str | None = None, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(name=f"salt_{name}", kind="gauge", unit=unit, help=help, of=of or name, labels=labels)


def _times(name: str, help: str, of: str) -> Metric:
    return Metric(name=f"salt_{name}_seconds", kind="histogram", unit="seconds", help=help, of=of)


SERVICE = (
    _counter(
        "requests",
        "requests",
        "Requests answered, by route and code; 499: the client left",
        "answers",
        ("route", "code"),
    ),
    _counter(
        "clips_served",
        "targets",
        "Targets sent: computed + coalesced + from memory + from disk, where no client leaves early",
    ),
    _counter("clips_computed", "clips", "Clips that went through the teacher"),
    _counter("coalesced", "targets", "Targets sent that another request had already begun"),
    _counter("from_memory", "targets", "Targets sent that were in memory"),
    _counter("from_disk", "targets", "Targets sent that were in the cache on disk"),
    _counter("passed_on", "rows", "Rows that another replica, their clip's owner, was asked for"),
    _counter("need_clip", "rows", "Rows answered with a request for the clip's bytes"),
    _counter("refused", "rows", "Rows answered bad_digest or bad_shape"),
    _counter("busy", "requests", "Requests answered 429 for lack of room"),
    _counter("expired", "requests", "Requests answered 504: their deadline passed"),
    _counter(
        "abandoned", "clips", "Clips that cost no forward, since everybody who waited for them had left"
    ),
    _counter("retries_seen", "requests", "Requests that repeat one, as their clients say"),
    _counter("bytes_in", "bytes", "Bodies of requests for targets"),
    _counter("bytes_out", "bytes", "Bodies of their answers"),
    _counter("forwards", "forwards", "Teacher forwards, the padded ones too"),
    _counter("disk_not_written", "targets", "Targets that the cache on disk was too slow for, or failed at"),
    _counter("disk_corrupt", "targets", "Targets whose bytes on disk were damaged; they were computed again"),
    _counter("board_not_written", "lines", "Lines that the board's file did not take"),
    _counter("board_corrupt", "lines", "Lines of the board's file that were damaged"),
    _times("queue_wait", "What clips waited for their forward", "queue_wait"),
    _times("forward", "Teacher forwards, a batch each", "forward"),
    _times("serialise", "Writing an answer's bytes", "serialise"),
    _times("request", "Requests for targets, from their head to the last byte of the answer", "total"),
    _gauge("batch_fill", "ratio", "Clips per forward, over the batch size"),
    _gauge("queued_clips", "clips", "Clips that wait for a forward"),
    _gauge("open_requests", "requests", "Requests for targets that are being answered"),
    _gauge("leases", "clips", "Clips that somebody is to upload"),
    _gauge("memory_clips", "targets", "Targets in memory"),
    _gauge("memory_bytes", "bytes", "Targets in memory"),
    _gauge("disk_clips", "targets", "Targets in the cache on disk"),
    _gauge("replicas", "replicas", "Replicas that take requests"),
    _gauge("draining", "replicas", "Replicas that only answer what they have begun"),
)
"""Sums over all replicas, whichever answers."""
RUNS = (
    _counter("run_clips_served", "targets", "Targets that a run was sent", "clips_served", ("run",)),
    _counter(
        "run_clips_computed", "clips", "Clips that a run caused the forward of", "clips_computed", ("run",)
    ),
    _counter("run_bytes_out", "bytes", "Bodies of answers to a run", "bytes_out", ("run",)),
    _gauge("run_step", "steps", "Optimizer steps done, as the run reported last", "step", ("run",)),
    _gauge("run_loss", "L1", "Loss", "loss", ("run",)),
    _gauge("run_flops", "FLOP", "Compute spent, teacher forward included", "flops", ("run",)),
    _gauge(
        "run_teacher_wait_ms",
        "milliseconds",
        "What a step waited for its targets",
        "teacher_wait_ms",
        ("run",),
    ),
    _gauge("run_clips_per_s", "clips/s", "Speed", "clips_per_s", ("run",)),
    _gauge(
        "run_skew_clips",
        "clips",
        "How far ahead of the slowest of its group; none without a group",
        "skew_clips",
        ("run",),
    ),
    _gauge(
        "run_seen_timestamp_seconds", "seconds since 1970", "When it was heard of last", "seen_s", ("run",)
    ),
)
"""One sample for each run on the board."""
STUDENT = (
    _gauge("student_step", "steps", "Optimizer steps done", "step"),
    _gauge("student_loss", "L1", "Loss, mean of the interval's steps", "loss"),
    _gauge("student_clips_per_s", "clips/s", "Speed, all workers together", "clips_per_s"),
    _gauge("student_tokens_per_s", "tokens/s", "Speed in tokens of whole clips", "tokens_per_s"),
    _gauge(
        "student_mfu",
        "ratio",
        "Model FLOPs utilisation: matrix products of the run over the measured peak of its workers",
        "mfu",
    ),
    _gauge(
        "student_teacher_wait_ms", "milliseconds", "What a step waited for its targets", "teacher_wait_ms"
    ),
    _gauge("student_data_wait_ms", "milliseconds", "What a step waited for its clips", "data_wait_ms"),
    _gauge("student_step_ms", "milliseconds", "A step", "step_ms"),
    _gauge("student_grad_norm", "norm", "Global norm of the gradient", "grad_norm"),
    _gauge("student_lr", "learning rate", "Learning rate", "lr"),
    _gauge("student_flops", "FLOP", "Compute spent, teacher forward included", "flops"),
    _gauge("student_bad_clips", "clips", "Clips that could not be decoded", "bad_clips"),
)
"""The newest line of metrics.jsonl: means over `log_every` steps."""

_PAGE = """# Metrics

Written by `python -m salt_distill.common.metrics`; a test says whether it is up to date.
`deploy/prometheus.yml` scrapes them, `deploy/grafana-dashboard.json`
shows them.

## The service: `GET /metrics`

Sums over all replicas, whichever answers; what replicas did that have ended stays in the counters.

{service}
One sample for each run on the board:

{runs}
## A student: `salt-train ... --metrics-port PORT`

`http://HOST:PORT/metrics` of the run's first worker: the newest line of `metrics.jsonl`, a mean over `log_every` steps.

{student}"""


def page() -> str:
    """docs/metrics.md."""
    return _PAGE.format(service=_table(SERVICE), runs=_table(RUNS), student=_table(STUDENT))


def _table(metrics: tuple[Metric, ...]) -> str:
    lines = ["| metric | kind | unit | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        labels = "{" + ", ".join(metric.labels) + "}" if metric.labels else ""
        lines.append(f"| `{metric.name}{labels}` | {metric.kind} | {metric.unit} | {metric.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from pathlib import Path

    (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").write_text(page())
