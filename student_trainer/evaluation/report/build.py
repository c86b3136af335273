"""`salt-eval report`: one HTML page and one summary about a set of runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from salt_distill.common.config import ReportConfig
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.report import page, predictions, sections
from salt_distill.student_trainer.evaluation.report.lineage import teachers_among
from salt_distill.student_trainer.evaluation.report.sharing import Sharing, read_sharing
from salt_distill.student_trainer.evaluation.runs import Run, find_runs, is_run, read_json, read_seconds
from salt_distill.student_trainer.evaluation.selection import Selection

SUMMARY_NAMES = {"digit": "appearance"}
"""What a label of the embedded data set is called in summary.json; every other label keeps its name."""

PAGE_ONLY = {"weights", "compute", "step"}
"""Columns of the table of runs that the terminal has no room for."""


def run(config: ReportConfig) -> None:
    """Writes the page and summary.json, prints the table and what is missing."""
    folder = None if config.runs is None else Path(config.runs)
    out = Path(config.out) if config.out is not None else Path(config.runs or ".") / "report.html"
    if is_run(out.parent):
        raise ValueError(
            f"got --out {out}, expected a folder that is no run directory: summary.json there is the"
            " run's own"
        )
    runs, unfinished = find_runs(config.run_dirs, folder)
    probe = read_json(folder and folder / "probe.json")
    status = read_json(folder and folder / "server.json")
    shared = None if status is None else read_sharing(status)
    selected = read_json(folder and folder / "select.json")
    selection = None if selected is None else Selection.from_json(selected)
    seconds = read_seconds(folder and folder / "steps.tsv")

    html, missing = build(runs, unfinished, probe, selection, shared, seconds)
    write_whole(out, html)
    write_whole(
        out.parent / "summary.json", json.dumps(summarise(runs, probe, shared, seconds), indent=2) + "\n"
    )
    _print(runs, probe, missing, out)


def build(
    runs: Sequence[Run],
    unfinished: Sequence[Path],
    probe: dict[str, Any] | None,
    selection: Selection | None,
    shared: Sharing | None,
    seconds: dict[str, float],
) -> tuple[str, list[str]]:
    """The page, and a sentence for everything that could not be shown."""
    teachers = teachers_among(runs)
    missing = [f"{path} is left out: the run has not finished." for path in unfinished]
    header, rows = sections.headline(runs, probe)
    parts = [page.section("Runs", page.table(header, rows)), sections.curves(runs)]
    if probe is None:
        missing.append("No probe: there is no probe.json beside the runs (salt-eval probe writes it).")
    elif not probe["accuracy"]:
        missing.append("No probe: the data set has no labels.")
    else:
        parts.append(sections.probe_bars(runs, probe))
        compared = sections.accuracy_and_compute(runs, probe, teachers)
        parts += [] if compared is None else [compared]
    if selection is None:
        missing.append(
            "No held-out losses: there is no select.json beside the runs (salt-eval select writes it)."
        )
    else:
        parts.append(predictions.section(selection, runs))
    if shared is None:
        missing.append(
            "No counters of a teacher service: there is no server.json beside the runs (salt-serve status"
            " prints it)."
        )
    else:
        parts.append(sections.sharing(shared, runs))
    painted, why_not = sections.masks_and_reconstruction(runs[0])
    parts += painted
    if why_not is not None:
        missing.append(why_not)
    elif runs[0].objective != "vpixel":
        missing.append("No reconstruction: there is no stage 1 run among these.")
    if why_not is None:
        parts.append(sections.latents(runs, teachers))
    if seconds:
        parts.append(sections.seconds_per_step(seconds))
    else:
        missing.append("No seconds per step: there is no steps.tsv beside the runs.")
    if missing:
        parts.append(page.section("Not in this report", *map(page.note, missing)))
    num_students = sum(run.objective == "salt" for run in runs)
    lead = f"{len(runs)} runs, {num_students} of them students of a frozen teacher (SALT, arXiv:2509.24317)."
    footer = (
        "Made by salt-eval report from the runs' own files; nothing on this page is loaded from elsewhere."
    )
    return page.page("SALT as a service", lead, parts, footer), missing


def summarise(
    runs: Sequence[Run], probe: dict[str, Any] | None, shared: Sharing | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """``summary.json``: the numbers of the page for other programs; null or empty where a part is missing."""
    teachers = [run for run in runs if run.objective == "vpixel"]
    return {
        "teacher": (
            {key: teachers[0].summary[key] for key in ("loss_first", "loss_last")} if teachers else None
        ),
        "students": [
            {
                "name": run.name,
                **{key: run.summary[key] for key in ("source", "loss_first", "loss_last", "teacher_wait_ms")},
            }
            for run in runs
            if run.objective == "salt"
        ],
        "server": (
            None
            if shared is None
            else {"clips_served": shared.clips_served, "clips_computed": shared.clips_computed}
        ),
        "probe": {
            name: {SUMMARY_NAMES.get(label, label): value for label, value in row.items()}
            for name, row in (probe["accuracy"] if probe else {}).items()
        },
        "seconds": seconds,
    }


def _print(runs: Sequence[Run], probe: dict[str, Any] | None, missing: Sequence[str], out: Path) -> None:
    console = Console()
    header, rows = sections.headline(runs, probe)
    table = Table(box=box.SIMPLE_HEAD)
    shown = [number for number, name in enumerate(header) if name not in PAGE_ONLY]
    for number in shown:
        table.add_column(header[number], justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[number] for number in shown))
    console.print(table)
    for sentence in missing:
        console.print(sentence, highlight=False)
    console.print(f"report: {out.resolve()}", highlight=False, soft_wrap=True)
