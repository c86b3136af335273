"""Writes the study's page: what was run, what was found, what was not run."""

import os
import platform
import re
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.study import text
from benchmarks.study.findings import LABELS, RANDOM, Difference, Findings, difference
from benchmarks.study.jobs import MEMORIES, Lengths
from benchmarks.study.runner import read_ended
from salt_distill.common.whole import write_whole

LARGE = {
    "flops": "SALT and the EMA baseline at equal FLOPs",
    "sizes": "Size of the teacher, size of the student (Figure 6)",
    "data": "What the teacher learned from (Figure 4)",
    "masks": "The teacher's masks (Figure 5)",
    "split": "How to split a budget of steps (Figures 7 and 8)",
    "chain": "Chained stages: a student as the next teacher",
}
"""Experiments of `STUDY=large`, each with a probe of its own."""
NAMES = {
    RANDOM: "random weights",
    "teacher": "teacher (V-Pixel)",
    "student": "student (SALT)",
    "ema": "EMA baseline (V-JEPA 2)",
}


def write_page(path: Path, root: Path, lengths: Lengths, *, has_strokes: bool) -> None:
    """Writes ``path``, and its figures beside it, from what has run so far."""
    findings = Findings(root=root, num_seeds=lengths.seeds)
    data_sets = [data for data in LABELS if findings.probes(data)]
    lines = [
        *_opening(root, lengths),
        *_claims(findings, data_sets, lengths),
        *_tables(findings, data_sets, lengths),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if data_sets:
        picture = path.with_name(f"{path.stem}-accuracy.png")
        _draw_accuracies(picture, findings, data_sets, lengths)
        lines += [
            "",
            f"![accuracy of each run, a dot for each seed]({picture.name})",
            "",
            _filled(text.DOTS),
        ]
    if findings.selections():
        picture = path.with_name(f"{path.stem}-loss.png")
        _draw_losses(picture, findings)
        lines += _selection(findings, picture.name)
    lines += _large(findings)
    missing = (
        [f"pen strokes: {'not through yet' if has_strokes else 'the drawings were not there'}"]
        if "strokes" not in data_sets
        else []
    )
    missing += [title for name, title in LARGE.items() if not findings.probes("digits", name)]
    if missing:
        lines += ["", "## Not run", "", *(f"- {one}" for one in missing)]
        lines += ["", _filled(text.NOT_RUN)]
    write_whole(path, "\n".join(lines) + "\n")


def _opening(root: Path, lengths: Lengths) -> Iterator[str]:
    ended = read_ended(root)
    cpu_s = sum(one.cpu_s for one in ended.values())
    yield "# The paper's claims at small scale"
    yield ""
    yield _filled(
        text.OPENING,
        seeds=lengths.seeds,
        digits=lengths.of("digits"),
        strokes=lengths.of("strokes"),
        memories=MEMORIES,
        videos=lengths.videos,
        passes=lengths.probe_epochs,
        day=f"{date.today():%Y-%m-%d}",
        commands=len(ended),
        minutes=cpu_s / 60,
        machine=f"{os.cpu_count()} cores ({platform.machine()}), {_device()}, torch {torch.__version__}",
    )


def _filled(template: str, **facts: object) -> str:
    """Paragraphs and lists in lines of 160 characters."""
    blocks = []
    for block in template.format(**facts).strip().split("\n\n"):
        items = re.split(r"\n(?=- )", block)
        blocks.append(
            "\n".join(
                textwrap.fill(
                    " ".join(item.split()),
                    160,
                    subsequent_indent="  " if item.startswith("- ") else "",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for item in items
            )
        )
    return "\n\n".join(blocks)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _claims(findings: Findings, data_sets: Sequence[str], lengths: Lengths) -> Iterator[str]:
    yield ""
    yield "## What was found"
    yield ""
    yield _filled(text.CLAIMS)
    yield ""
    yield "| claim | data | difference (95% interval) | each seed | |"
    yield "|---|---|---:|---|---|"
    for title, better, worse in (
        ("the teacher has learned: above random weights", "teacher", RANDOM),
        ("a student beats its teacher (section 4)", "student", "teacher"),
        ("SALT beats the EMA baseline at equal steps, the teacher's counted (Figure 2)", "student", "ema"),
        ("a student beats the EMA baseline of its own steps", "student", "ema/step-{steps}"),
    ):
        for data in data_sets:
            steps = lengths.of(data)
            names = [name.format(steps=steps) for name in (better, worse)]
            first, second = (findings.accuracies(data, name, LABELS[data]) for name in names)
            yield (
                f"| {title} | {data}, {LABELS[data]} |"
                f" {_difference(difference(list(first.values()), list(second.values())))}"
            )
    if selections := [one for one in findings.selections().values() if one["r2"] is not None]:
        values = ", ".join(f"{one['r2']:.2f}" for one in selections)
        falls = "in every seed" if all(one["slope"] < 0 for one in selections) else "not in every seed"
        how = (
            f"R² {values} | {selections[0]['num_probed']} checkpoints each | a lower loss goes with a higher"
            f" accuracy {falls}"
        )
        yield f"| held-out loss predicts accuracy (Figure 3: R² 0.951) | digits, motion | {how} |"


def _difference(found: Difference) -> str:
    interval = "" if found.interval is None else " ({:+.3f} to {:+.3f})".format(*found.interval)
    return (
        f"{found.mean:+.3f}{interval} | {', '.join(f'{one:+.3f}' for one in found.by_seed)} |"
        f" {found.verdict} |"
    )


def _tables(findings: Findings, data_sets: Sequence[str], lengths: Lengths) -> Iterator[str]:
    for data in data_sets:
        probe = next(iter(findings.probes(data).values()))
        labels = probe["labels"]
        chances = [f"{label} (chance {fact['chance']:.3f})" for label, fact in labels.items()]
        yield ""
        yield f"## {data.capitalize()}"
        yield ""
        yield _filled(text.TABLE, num_test=next(iter(labels.values()))["num_test"])
        yield ""
        yield f"| | {' | '.join(chances)} | training FLOPs |"
        yield f"|---|{'---:|' * len(labels)}---:|"
        for name, title, flops in _rows(findings, data, lengths):
            cells = [_spread(list(findings.accuracies(data, name, label).values())) for label in labels]
            yield f"| {title} | {' | '.join(cells)} | {'' if flops is None else f'{flops:.2e}'} |"


def _rows(findings: Findings, data: str, lengths: Lengths) -> Iterator[tuple[str, str, float | None]]:
    steps = lengths.of(data)
    yield RANDOM, NAMES[RANDOM], None
    yield "teacher", f"{NAMES['teacher']}, {steps} steps", findings.flops(data, "teacher")
    yield "student", f"{NAMES['student']}, {steps} steps", findings.flops(data, "teacher", "student")
    yield f"ema/step-{steps}", f"{NAMES['ema']}, {steps} steps", _half(findings.flops(data, "ema"))
    yield "ema", f"{NAMES['ema']}, {2 * steps} steps", findings.flops(data, "ema")


def _half(flops: float | None) -> float | None:
    return None if flops is None else flops / 2


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _selection(findings: Findings, picture: str) -> Iterator[str]:
    yield ""
    yield "## Held-out loss and accuracy"
    yield ""
    yield _filled(text.SELECTION)
    yield ""
    yield f"![held-out loss against accuracy]({picture})"
    by_size = [
        (seed, run, _of_run(found, run))
        for seed, found in findings.selections().items()
        for run in _runs_of(found)
    ]
    yield ""
    yield (
        "| seed | R² | slope | "
        + " | ".join(f"R² of {run} alone" for run in _runs_of(next(iter(findings.selections().values()))))
        + " |"
    )
    yield "|---|---:|---:|" + "---:|" * len({run for _, run, _ in by_size})
    for seed, found in findings.selections().items():
        alone = [f"{_r2(points):.2f}" for of, _, points in by_size if of == seed]
        yield f"| {seed} | {found['r2']:.2f} | {found['slope']:.2f} | {' | '.join(alone)} |"


def _runs_of(selection: dict) -> list[str]:
    return list(dict.fromkeys(row["name"].partition("/")[0] for row in selection["checkpoints"]))


def _of_run(selection: dict, run: str) -> list[tuple[float, float]]:
    return [
        (row["x"], row["accuracy"])
        for row in selection["checkpoints"]
        if row["name"].partition("/")[0] == run
    ]


def _r2(points: Sequence[tuple[float, float]]) -> float:
    return statistics.correlation(*zip(*points, strict=True)) ** 2


def _large(findings: Findings) -> Iterator[str]:
    for experiment, title in LARGE.items():
        probes = findings.probes("digits", experiment)
        if not probes:
            continue
        yield ""
        yield f"## {title}"
        yield ""
        yield _filled(text.LARGE, done=len(probes), seeds=findings.num_seeds)
        yield ""
        yield "| | motion, mean (least to most) | minus the student's, each seed |"
        yield "|---|---:|---|"
        student = findings.accuracies("digits", "student", "motion")
        for run in next(iter(probes.values()))["accuracy"]:
            found = findings.accuracies("digits", run, "motion", experiment)
            less = ", ".join(f"{value - student[seed]:+.3f}" for seed, value in found.items())
            yield f"| {run} | {_spread(list(found.values()))} | {less} |"


def _draw_accuracies(path: Path, findings: Findings, data_sets: Sequence[str], lengths: Lengths) -> None:
    figure = Figure(figsize=(4.6 * len(data_sets), 2.6), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(data_sets), squeeze=False)[0], data_sets, strict=True):
        rows = list(_rows(findings, data, lengths))
        for row, (name, _, _) in enumerate(rows):
            values = list(findings.accuracies(data, name, LABELS[data]).values())
            axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.7)
            axes.plot(statistics.fmean(values), row, "|", color="black", markersize=18)
        axes.set_yticks(range(len(rows)), [title for _, title, _ in rows], fontsize=8)
        axes.axvline(
            next(iter(findings.probes(data).values()))["labels"][LABELS[data]]["chance"],
            color="grey",
            linestyle=":",
        )
        axes.invert_yaxis()
        axes.set_xlabel(f"{data}: accuracy on {LABELS[data]}", fontsize=8)
        axes.set_xlim(left=0)
    figure.savefig(path, dpi=110)


def _draw_losses(path: Path, findings: Findings) -> None:
    selections = findings.selections()
    figure = Figure(figsize=(3.6 * len(selections), 3.2), layout="constrained")
    for axes, (seed, found) in zip(
        figure.subplots(1, len(selections), squeeze=False, sharey=True)[0], selections.items(), strict=True
    ):
        for number, run in enumerate(_runs_of(found)):
            x, y = zip(*_of_run(found, run), strict=True)
            axes.plot(x, y, "o-", color=f"C{number}", linewidth=0.7, label=run)
        if found["r2"] is not None:
            ends = [
                min(row["x"] for row in found["checkpoints"]),
                max(row["x"] for row in found["checkpoints"]),
            ]
            axes.plot(
                ends, [found["intercept"] + found["slope"] * x for x in ends], color="grey", linestyle="--"
            )
            axes.set_title(f"seed {seed}: R² {found['r2']:.2f}", fontsize=9)
        axes.set_xlabel("held-out loss", fontsize=8)
    figure.axes[0].set_ylabel("accuracy on motion", fontsize=8)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
