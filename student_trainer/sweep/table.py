"""What came of a sweep: its runs beside each other, and what one teacher for all of them saved."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from salt_distill.common.config import StudentRun
from salt_distill.common.credentials import access_token
from salt_distill.student_trainer.evaluation.report.sharing import Sharing, read_sharing
from salt_distill.student_trainer.run_flops import scientific
from salt_distill.student_trainer.targets.client import ServiceClient
from salt_distill.student_trainer.targets.retry import TeacherUnavailableError

_COUNTED = (
    "clips_served",
    "clips_computed",
    "coalesced",
    "from_memory",
    "bytes_in",
    "bytes_out",
    "forward_s",
)
"""Counters of the service that what sharing saved follows from."""


class SharedWork:
    """What the service did inside the block, and in earlier parts of the same sweep; nothing where the runs
    use none."""

    def __init__(self, config: StudentRun, summary: Path) -> None:
        """``config``: of any of the runs, which share a teacher. ``summary``: of the sweep, as an earlier
        part left it."""
        self._client = None
        if config.teacher_url is not None:
            token = access_token(config.teacher_token_file)
            self._client = ServiceClient(
                config.teacher_url, config.client, "sweep", token=token, ca=config.teacher_ca
            )
        earlier = json.loads(summary.read_text())["sharing"] if summary.exists() else None
        self._earlier = {name: 0 if earlier is None else earlier[name] for name in _COUNTED}

    def __enter__(self) -> Self:
        self._before = {} if self._client is None else self._client.teacher().counters.model_dump()
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()

    def sharing(self) -> Sharing | None:
        """Of the sweep so far; None without a service, or where it has gone."""
        if self._client is None:
            return None
        try:
            facts = self._client.teacher().model_dump(mode="json")
        except TeacherUnavailableError:
            return None
        now, before = facts["counters"], self._before
        if (
            now["clips_served"] < before["clips_served"]
        ):  # it was started again meanwhile, and counts from zero
            before = dict.fromkeys(before, 0)
        return read_sharing(
            facts | {"counters": {name: now[name] - before[name] + self._earlier[name] for name in _COUNTED}}
        )


def summarise(
    runs: Mapping[str, StudentRun], failed: Mapping[str, str], shared: SharedWork
) -> dict[str, Any]:
    """Plain types: each run's configuration and results, and ``sharing``."""
    sharing = shared.sharing()
    saved = None
    if sharing is not None:
        own = {
            "forwards_avoided": sharing.forwards_avoided,
            "flops_saved": sharing.flops_saved,
            "bytes_not_uploaded": sharing.bytes_not_uploaded,
        }
        saved = asdict(sharing) | own
    return {
        "runs": {name: _result(config, failed.get(name)) for name, config in runs.items()},
        "sharing": saved,
    }


def _result(config: StudentRun, failure: str | None) -> dict[str, Any]:
    path = Path(config.out) / "summary.json"
    result: dict[str, Any] = {
        "out": config.out,
        "state": "done" if failure is None else "failed",
        "failure": failure,
    }
    shown = ("loss_last", "flops", "teacher_wait_ms", "data_wait_ms", "step_ms")
    found = json.loads(path.read_text()) if failure is None else dict.fromkeys(shown)
    return result | {name: found[name] for name in shown}


def print_table(summary: dict[str, Any]) -> None:
    """On standard output, the lowest loss first."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("run", "loss", "FLOPs, 6ND", "step ms", "teacher wait ms", "data wait ms", ""):
        table.add_column(name, justify="left" if name in ("run", "") else "right", no_wrap=True)
    done = sorted((run["loss_last"], name) for name, run in summary["runs"].items() if run["state"] == "done")
    for loss, name in done:
        run = summary["runs"][name]
        waits = (f"{run[wait]:,.1f}" for wait in ("step_ms", "teacher_wait_ms", "data_wait_ms"))
        table.add_row(name, f"{loss:.4f}", scientific(run["flops"]), *waits)
    for name, run in summary["runs"].items():
        if run["state"] == "failed":
            table.add_row(name, "", "", "", "", "", "failed", style="red")
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # a wide table is read by scrolling, not cut off
    console.print(table)
    console.print(_saved(summary), soft_wrap=True)


def _saved(summary: dict[str, Any]) -> str:
    sharing = summary["sharing"]
    if sharing is None:
        return "No teacher service that could say what sharing saved."
    spent = sum(run["flops"] for run in summary["runs"].values() if run["state"] == "done")
    share = f", {sharing['flops_saved'] / spent:.0%} of what the runs would have taken alone" if spent else ""
    return (
        f"One teacher for all: {sharing['clips_computed']:,} forwards for {sharing['clips_served']:,}"
        f" targets, {sharing['forwards_avoided']:,} saved; {scientific(sharing['flops_saved'])} FLOPs{share};"
        f" {decimal(sharing['bytes_not_uploaded'])} not uploaded."
    )
