"""`salt-eval report`: one HTML page and one summary about a set of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from salt_distill.common.config import ReportConfig
from salt_distill.common.console import new_results
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.finished_runs import (
    FinishedRun,
    UnfinishedRun,
    find_runs,
    is_run,
    read_seconds,
    read_unfinished,
)
from salt_distill.student_trainer.evaluation.probe.results import ProbeResults
from salt_distill.student_trainer.evaluation.report import (
    accuracy,
    clip_pictures,
    predictions,
    provenance,
    sharing,
)
from salt_distill.student_trainer.evaluation.report.blocks import (
    BarTable,
    DataTable,
    NamedBar,
    Paragraph,
    ReportPage,
    Section,
)
from salt_distill.student_trainer.evaluation.report.findings import findings
from salt_distill.student_trainer.evaluation.report.lineage import teachers_among
from salt_distill.student_trainer.evaluation.report.probed_runs import ProbedRuns
from salt_distill.student_trainer.evaluation.report.render import html_of
from salt_distill.student_trainer.evaluation.report.runs_table import curves, headline
from salt_distill.student_trainer.evaluation.report.summary import ReportSummary
from salt_distill.student_trainer.evaluation.selection import SelectResults

FOOTER = "Made by salt-eval report from the runs' own files; nothing on this page is loaded from elsewhere."
PAGE_ONLY = {"weights", "time", "compute", "step"}
"""Columns of the table of runs that the terminal has no room for."""


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """What a report is about; None or empty where a file is not there."""

    runs: Sequence[FinishedRun]
    unfinished: Sequence[UnfinishedRun]
    probe: ProbeResults | None = None
    selection: SelectResults | None = None
    shared: sharing.Sharing | None = None
    seconds: dict[str, float]

    @property
    def probed(self) -> ProbedRuns | None:
        """The runs beside the probe's rows."""
        return None if self.probe is None else ProbedRuns(self.probe, self.runs)


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
    probe, selection, server = (_there(folder, name) for name in ("probe.json", "select.json", "server.json"))
    report = ReportInput(
        runs=runs,
        unfinished=[read_unfinished(path) for path in unfinished],
        probe=probe and ProbeResults.read(probe),
        selection=selection and SelectResults.read(selection),
        shared=server and sharing.read_status(server),
        seconds=read_seconds(folder and folder / "steps.tsv"),
    )
    page, missing = build(report)
    write_whole(out, html_of(page))
    ReportSummary.of(runs, report.probe, report.shared, report.seconds).write(out.parent / "summary.json")
    _print(report, missing, out)


def _there(folder: Path | None, name: str) -> Path | None:
    path = folder and folder / name
    return path if path is not None and path.is_file() else None


def build(report: ReportInput) -> tuple[ReportPage, list[str]]:
    """The page, and a sentence for everything that could not be shown."""
    runs, probed = report.runs, report.probed
    teachers = teachers_among(runs)
    missing = [f"Only table and loss of {run.name}: the run has not finished." for run in report.unfinished]
    sections: list[Section | None] = [
        Section("Runs", [DataTable(*headline(runs, report.unfinished, probed))]),
        curves(runs, report.unfinished),
    ]
    if probed is None:
        missing.append("No probe: there is no probe.json beside the runs (salt-eval probe writes it).")
    elif not probed.probe.accuracy:
        missing.append("No probe: the data set has no labels.")
    else:
        sections += [accuracy.probe_bars(probed), accuracy.accuracy_and_compute(probed, teachers)]
        missing += probed.not_measured()
    if report.selection is None:
        missing.append(
            "No held-out losses: there is no select.json beside the runs (salt-eval select writes it)."
        )
    else:
        sections.append(predictions.section(report.selection, runs))
    if report.shared is None:
        missing.append(
            "No counters of a teacher service: there is no server.json beside the runs (salt-serve status"
            " prints it)."
        )
    else:
        sections.append(sharing.section(report.shared, runs))
    pictures, why_not = _pictures(runs, teachers)
    sections += pictures
    missing += why_not
    if report.seconds:
        sections.append(_seconds(report.seconds))
    else:
        missing.append("No seconds per step: there is no steps.tsv beside the runs.")
    sections.append(provenance.section(runs, report.unfinished))
    if missing:
        sections.append(Section("Not in this report", [Paragraph(text, quiet=True) for text in missing]))
    return ReportPage(
        title="SALT: frozen teachers and their students",
        lead=findings(runs, report.unfinished, probed),
        made=provenance.made_on(),
        sections=[section for section in sections if section is not None],
        footer=FOOTER,
    ), missing


def _pictures(
    runs: Sequence[FinishedRun], teachers: dict[str, list[FinishedRun | None]]
) -> tuple[list[Section], list[str]]:
    """Sections that show a clip of the first run's data, and what could not be shown."""
    if not runs:
        return [], ["No pictures: no run has finished."]
    first = runs[0]
    try:
        clip = clip_pictures.clip_of(first)
    except ValueError as error:
        return [], [f"No pictures: {error}."]
    latents = clip_pictures.latents(clip, runs, teachers)
    if first.objective == "vpixel":
        return [clip_pictures.masks(first, clip), clip_pictures.reconstruction(first, clip), latents], []
    return [clip_pictures.masks(first, clip), latents], [
        "No reconstruction: there is no stage 1 run among these."
    ]


def _seconds(seconds: dict[str, float]) -> Section:
    """Where the time of a script went."""
    bars = [NamedBar(name, f"{value:.1f} s", value) for name, value in seconds.items()]
    return Section(f"Seconds: {sum(seconds.values()):.0f} in all", [BarTable(("step", "time"), bars)])


def _print(report: ReportInput, missing: Sequence[str], out: Path) -> None:
    console = new_results()
    header, rows = headline(report.runs, report.unfinished, report.probed)
    table = Table(box=box.SIMPLE_HEAD)
    columns = [number for number, name in enumerate(header) if name not in PAGE_ONLY]
    for number in columns:
        table.add_column(header[number], justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[number] for number in columns))
    console.print(table)
    for sentence in missing:
        console.print(sentence, highlight=False)
    console.print(f"report: {out.resolve()}", highlight=False, soft_wrap=True)
