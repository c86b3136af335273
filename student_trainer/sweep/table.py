"""What came of a sweep: its runs beside each other, and what one teacher for all of them saved."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, TypeAdapter
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from salt_distill.common.config import StudentRun
from salt_distill.common.config.base import Several
from salt_distill.common.credentials import access_token
from salt_distill.student_trainer.evaluation.report.sharing import (
    NOTHING,
    ServiceStatus,
    Sharing,
    SharingCounters,
)
from salt_distill.student_trainer.run_flops import scientific
from salt_distill.student_trainer.targets.client import ServiceClient
from salt_distill.student_trainer.targets.retry import TeacherUnavailableError


class DoneRun(BaseModel, frozen=True):
    """A run that came to its last step: what its ``summary.json`` says."""

    out: str
    state: Literal["done"] = "done"
    failure: None = None
    loss_last: float
    flops: float
    teacher_wait_ms: float
    data_wait_ms: float
    step_ms: float


class FailedRun(BaseModel, frozen=True):
    """A run that did not."""

    out: str
    state: Literal["failed"] = "failed"
    failure: str
    loss_last: None = None
    flops: None = None
    teacher_wait_ms: None = None
    data_wait_ms: None = None
    step_ms: None = None


class SweepSummary(BaseModel, frozen=True):
    """``summary.json`` of a sweep."""

    runs: dict[str, DoneRun | FailedRun]
    sharing: Several[Sharing]
    """What one teacher for all runs saved, of each service; None where they could not say it."""


_EARLIER = TypeAdapter(Several[SharingCounters])


class SharedWork:
    """What each service did inside the block, and in earlier parts of the same sweep; nothing where the runs
    use none."""

    def __init__(self, config: StudentRun, summary: Path) -> None:
        """``config``: of any of the runs, which share their teachers. ``summary``: of the sweep, as an
        earlier part left it."""
        self._clients = []
        for url in config.teacher_url:
            token = access_token(config.teacher_token_file)
            self._clients.append(
                ServiceClient(url, config.client, "sweep", token=token, ca=config.teacher_ca)
            )
        earlier = _EARLIER.validate_python(
            json.loads(summary.read_text())["sharing"] if summary.exists() else None
        )
        self._earlier = earlier or (NOTHING,) * len(self._clients)

    def __enter__(self) -> Self:
        self._before = [_status(client).counters for client in self._clients]
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()

    def sharing(self) -> tuple[Sharing, ...]:
        """Of the sweep so far, of each service; none where one has gone."""
        try:
            statuses = [_status(client) for client in self._clients]
        except TeacherUnavailableError:
            return ()
        found = []
        for status, before, earlier in zip(statuses, self._before, self._earlier, strict=True):
            now = status.counters
            if now.clips_served < before.clips_served:  # it was started again meanwhile, and counts from zero
                before = NOTHING
            found.append(status.sharing(SharingCounters.total((1, now), (-1, before), (1, earlier))))
        return tuple(found)


def summarise(runs: Mapping[str, StudentRun], failed: Mapping[str, str], shared: SharedWork) -> SweepSummary:
    """What came of all runs."""
    return SweepSummary(
        runs={name: _result(config, failed.get(name)) for name, config in runs.items()},
        sharing=shared.sharing(),
    )


def _status(client: ServiceClient) -> ServiceStatus:
    return ServiceStatus.model_validate(client.teacher().model_dump())


def _result(config: StudentRun, failure: str | None) -> DoneRun | FailedRun:
    if failure is not None:
        return FailedRun(out=config.out, failure=failure)
    results = json.loads((Path(config.out) / "summary.json").read_bytes())
    return DoneRun.model_validate({**results, "out": config.out})


def print_table(summary: SweepSummary) -> None:
    """On standard output, the lowest loss first."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("run", "loss", "FLOPs, 6ND", "step ms", "teacher wait ms", "data wait ms", ""):
        table.add_column(name, justify="left" if name in ("run", "") else "right", no_wrap=True)
    done = {name: run for name, run in summary.runs.items() if isinstance(run, DoneRun)}
    for name, run in sorted(done.items(), key=lambda item: (item[1].loss_last, item[0])):
        waits = (f"{wait:,.1f}" for wait in (run.step_ms, run.teacher_wait_ms, run.data_wait_ms))
        table.add_row(name, f"{run.loss_last:.4f}", scientific(run.flops), *waits)
    for name, run in summary.runs.items():
        if isinstance(run, FailedRun):
            table.add_row(name, "", "", "", "", "", "failed", style="red")
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # a wide table is read by scrolling, not cut off
    console.print(table)
    for sharing in summary.sharing:
        console.print(_saved(summary, sharing), soft_wrap=True)
    if not summary.sharing:
        console.print("No teacher service that could say what sharing saved.")


def _saved(summary: SweepSummary, sharing: Sharing) -> str:
    spent = sum(run.flops for run in summary.runs.values() if isinstance(run, DoneRun))
    share = f", {sharing.flops_saved / spent:.0%} of what the runs would have taken alone" if spent else ""
    return (
        f"One teacher for all: {sharing.clips_computed:,} forwards for {sharing.clips_served:,}"
        f" targets, {sharing.forwards_avoided:,} saved; {scientific(sharing.flops_saved)} FLOPs{share};"
        f" {decimal(sharing.bytes_not_uploaded)} not uploaded."
    )
