"""The files beside `probe.json` and the table on the terminal: each class, and who is taken for whom."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from salt_distill.common.csv_text import csv_text
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.probe.results import LabelResult, ProbeResults
from salt_distill.student_trainer.evaluation.probe.score import Score

_NAMED_CLASSES = 60
"""Most classes whose names fit beside a picture."""
_CLASS_COLUMNS = (
    *("encoder", "label", "class", "num_clips", "num_correct", "accuracy", "low", "high"),
    *("most_taken_for", "fingerprint", "index_hash"),
)


def write(out: Path, results: ProbeResults, label_results: Mapping[str, Mapping[str, LabelResult]]) -> None:
    """The JSON file; beside it, a table of the classes and a picture for each encoder and label."""
    if label_results:
        write_whole(out.with_name(f"{out.stem}.classes.tsv"), _classes(results, label_results))
    for name, row in label_results.items():
        for label, result in row.items():
            slug = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{name.strip('/')}-{label}")
            title = f"{name}, {label}: accuracy {result.score.accuracy:.3f} on {results.reported_on}"
            picture = out.with_name(f"{out.stem}.confusion") / f"{slug}.png"
            _draw(picture, result, results.labels[label].class_names, title)
    results.write(out)


def table(results: ProbeResults, caption: str) -> Table:
    """Accuracy and 95% interval of each encoder on each label, and the share of the largest class; the clips
    of each row where they differ."""
    title = f"Frozen-backbone probe, accuracy on the {results.reported_on} split"
    accuracies = Table(title=title, caption=caption)
    accuracies.add_column("encoder")
    for label, facts in results.labels.items():
        accuracies.add_column(f"{label} ({facts.num_classes} classes)", justify="right")
    clips = {name: encoder.clips for name, encoder in results.encoders.items()}
    clips_differ = len(set(clips.values())) > 1
    if clips_differ:
        accuracies.add_column("clips")
    for name, row in results.accuracy.items():
        cells = (
            f"[bold]{row[label]:.3f}[/]  [dim]{_interval(results.interval[name][label])}[/]"
            for label in results.labels
        )
        accuracies.add_row(name, *cells, *([clips[name]] if clips_differ else []))
    accuracies.add_section()
    accuracies.add_row(
        "[dim]chance (largest class)[/]",
        *(f"[dim]{facts.chance:.3f}[/]" for facts in results.labels.values()),
    )
    return accuracies


def _classes(results: ProbeResults, label_results: Mapping[str, Mapping[str, LabelResult]]) -> str:
    """Accuracy and interval for each class, tab-separated; classes without clips have none. Names with tabs
    or line breaks are quoted, as spreadsheets and pandas read them."""
    lines: list[tuple[object, ...]] = [_CLASS_COLUMNS]
    for name, row in label_results.items():
        identity = (results.encoders[name].fingerprint, results.index_hash)
        for label, result in row.items():
            class_names = results.labels[label].class_names
            for number, taken in enumerate(result.counts):
                num_clips, num_correct = int(taken.sum()), int(taken[number])
                if not num_clips:
                    continue
                score = Score(num_correct=num_correct, num_clips=num_clips)
                others = taken.clone()
                others[number] = 0
                other = class_names[int(others.argmax())] if others.any() else ""
                numbers = (f"{value:.4f}" for value in (score.accuracy, *score.interval))
                counts = (num_clips, num_correct, *numbers)
                lines.append((name, label, class_names[number], *counts, other, *identity))
    return csv_text(lines, dialect="excel-tab")


def _draw(path: Path, result: LabelResult, class_names: Sequence[str], title: str) -> None:
    """The confusion matrix: each row sums to 1."""
    from matplotlib.figure import Figure

    counts = result.counts.double()
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(12.0, 3.5 + 0.16 * len(class_names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(class_names) <= _NAMED_CLASSES:
        axes.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(class_names)), class_names, fontsize=7)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, label="share of the class's clips", fraction=0.046)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _interval(interval: tuple[float, float]) -> str:
    return "{:.3f}-{:.3f}".format(*interval)
