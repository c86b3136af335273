"""The study's four figures."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.study.findings import LABELS, RANDOM, Findings, counterpart, difference

KINDS = {"vpixel": "teacher (V-Pixel)", "salt": "student (SALT)", "vjepa": "EMA baseline (V-JEPA 2)"}
"""Of runs, by their objective."""
COLORS = {kind: f"C{number}" for number, kind in enumerate(KINDS)}
"""The same in all figures."""
DPI = 150


def draw_accuracies(path: Path, findings: Findings, rows: Mapping[str, Mapping[str, str]]) -> None:
    """A row of panels for each data set, a panel for each label; ``rows``: of each data set the runs to show,
    with their titles."""
    columns = max(len(LABELS[data]) for data in rows)
    figure = Figure(figsize=(2 + 2.2 * columns, 1.9 * len(rows)), layout="constrained")
    for panels, (data, titles) in zip(
        figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True
    ):
        for unused in panels[len(LABELS[data]) :]:
            unused.remove()
        kinds = findings.runs(data)
        for axes, label in zip(panels, LABELS[data], strict=False):
            most = 0.0
            for row, name in enumerate(titles):
                values = list(findings.accuracies(data, name, label).values())
                color = COLORS[kinds[name.partition("/")[0]]] if name != RANDOM else "grey"
                axes.plot(values, [row] * len(values), "o", color=color, alpha=0.6)
                axes.plot(statistics.fmean(values), row, "|", color="black", markersize=16)
                most = max(most, *values)
            axes.set_yticks(range(len(titles)), [""] * len(titles))
            chance = next(iter(findings.probes(data).values()))["labels"][label]["chance"]
            axes.axvline(chance, color="grey", linestyle=":")
            axes.set_ylim(len(titles) - 0.5, -0.5)
            axes.set_title(f"{data}: {label}", fontsize=9)
            axes.tick_params(axis="x", labelsize=7)
            axes.set_xlim(0, min(1.02, 1.15 * most))
        panels[0].set_yticks(range(len(titles)), list(titles.values()), fontsize=7)
    figure.savefig(path, dpi=DPI)


def draw_losses(path: Path, findings: Findings) -> None:
    """Held-out loss against accuracy, a panel for each seed, a line for each student."""
    selections, points_of = findings.selections(), findings.points()
    figure = Figure(figsize=(2.6 * len(selections), 2.8), layout="constrained")
    for axes, (seed, found) in zip(
        figure.subplots(1, len(selections), squeeze=False, sharey=True)[0], selections.items(), strict=True
    ):
        points = points_of[seed]
        for number, run in enumerate(dict.fromkeys(point.run for point in points)):
            x, y = zip(*((one.loss, one.accuracy["motion"]) for one in points if one.run == run), strict=True)
            axes.plot(x, y, "o-", color=f"C{number}", linewidth=0.7, label=run)
        if found["r2"] is not None:
            ends = [min(point.loss for point in points), max(point.loss for point in points)]
            line = [found["intercept"] + found["slope"] * x for x in ends]
            axes.plot(ends, line, color="grey", linestyle="--")
            axes.set_title(f"seed {seed}: R² {found['r2']:.2f}", fontsize=9)
        axes.set_xlabel("held-out loss", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("accuracy on motion", fontsize=8)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=DPI)


def draw_compute(path: Path, findings: Findings) -> None:
    """Training FLOPs against accuracy on digits: a dot for each finished run, its mean over seeds, with a
    line from the worst seed to the best."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    runs = findings.runs("digits")
    for axes, label in zip(panels, LABELS["digits"], strict=True):
        for objective, title in KINDS.items():
            points: list[tuple[float, list[float]]] = []
            for run in (name for name, of in runs.items() if of == objective):
                values = list(findings.accuracies("digits", run, label).values())
                flops = findings.flops("digits", run)
                if values and flops is not None:
                    points.append((flops / 1e12, values))
            for flops, values in points:
                axes.plot([flops, flops], [min(values), max(values)], color=COLORS[objective], linewidth=0.7)
            means = [statistics.fmean(values) for _, values in points]
            axes.plot(
                [flops for flops, _ in points], means, "o", color=COLORS[objective], alpha=0.6, label=title
            )
        random = statistics.fmean(findings.accuracies("digits", RANDOM, label).values())
        axes.axhline(random, color="grey", linestyle="--", linewidth=0.8, label="random weights")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=2))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda flops, _: f"{flops:g}")
        axes.set_title(f"digits: {label}", fontsize=9)
        axes.set_xlabel("training compute in 10¹² FLOPs (6ND), the teacher's counted", fontsize=8)
        axes.set_ylabel("accuracy", fontsize=8)
        axes.tick_params(which="both", labelsize=7)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=DPI)


def draw_decisions(path: Path, findings: Findings, experiments: Mapping[str, str]) -> None:
    """What each decision of the large study changed: a run's accuracy on motion minus its counterpart's.
    ``experiments``: titles by name."""
    objectives = findings.runs("digits")
    runs = {name: next(iter(findings.probes("digits", name).values()))["accuracy"] for name in experiments}
    num_rows = len(runs) + sum(map(len, runs.values()))
    figure = Figure(figsize=(7.5, 0.8 + 0.22 * num_rows), layout="constrained")
    axes = figure.subplots()
    labels: list[str] = []
    dots = [0.0]
    for experiment, title in experiments.items():
        axes.axhline(len(labels), color="0.9", linewidth=9, zorder=0)
        axes.annotate(title, (0.01, len(labels)), xycoords=("axes fraction", "data"), va="center", fontsize=7)
        labels.append("")
        for run in runs[experiment]:
            row, color = len(labels), COLORS[objectives[run]]
            labels.append(run)
            found = difference(
                findings.accuracies("digits", run, "motion"),
                findings.accuracies("digits", counterpart(run), "motion"),
            )
            axes.plot(found.by_seed, [row] * len(found.by_seed), "o", color=color, alpha=0.6, markersize=4)
            dots += found.by_seed
            if found.interval is not None:
                axes.plot(found.interval, [row, row], color="black", linewidth=0.8)
            axes.plot(found.mean, row, "|", color="black", markersize=9)
    axes.axvline(0, color="grey", linestyle=":")
    axes.set_xlim(min(dots) - 0.1, max(dots) + 0.1)  # the interval of two seeds can be wider than all
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(
        "accuracy on motion, minus that of the teacher or student of the table of digits", fontsize=8
    )
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    for kind, title in KINDS.items():
        axes.plot([], [], "o", color=COLORS[kind], alpha=0.6, markersize=4, label=title)
    figure.legend(fontsize=7, loc="outside upper right", ncols=len(KINDS), frameon=False)
    figure.savefig(path, dpi=DPI)
