"""What a probe found, for people and programs: the table, its JSON, the classes, and who is taken for
whom."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich.table import Table
from torch import Tensor

from salt_distill.common.config import ProbeConfig
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.probe.score import Score, score_of
from salt_distill.student_trainer.evaluation.probe.training import Setting

TRAIN, VAL, TEST = "train", "val", "test"
_NAMED_CLASSES = 60
"""Most classes whose names fit beside a picture."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the chosen probe of a label does."""

    setting: Setting
    chosen_by: Score | None
    """Its score on the split that the setting was chosen on; None where there was one setting."""
    counts: Int[Tensor, "classes classes"]
    """Clips of the split that is reported on: of each class, a row, taken for each, a column."""

    @property
    def score(self) -> Score:
        """Of all clips."""
        return score_of(self.counts)


Results = Mapping[str, Mapping[str, Found]]
"""Encoder -> label -> what was found."""


def reported_on(splits: Sequence[str], num_settings: int, data: str) -> str:
    """The split whose accuracy is reported. Raises ValueError where the probe cannot learn, be chosen or be
    scored honestly."""
    if TRAIN not in splits or not {VAL, TEST} & set(splits):
        known = ", ".join(sorted(splits))
        raise ValueError(
            f"{data}: got splits {known}, expected {TRAIN!r} for the probe to learn on and {TEST!r} (or"
            f" {VAL!r}) to score it on"
        )
    if num_settings > 1 and VAL not in splits:
        raise ValueError(
            f"{data}: got no split {VAL!r}, expected one to choose among {num_settings} settings on: chosen"
            f" on {TEST!r}, their best would say too much. Pack a part of {TRAIN!r} as {VAL!r}, or give one"
            " --lr and one --weight-decay"
        )
    return TEST if TEST in splits else VAL


def protocol(config: ProbeConfig, split: str) -> str:
    """How the accuracies came about, in a sentence."""
    before = config.depth - 1
    blocks = (
        f"{before} self-attention block{'s' * (before > 1)} and a cross-attention block"
        if before
        else "one cross-attention block"
    )
    clips = (
        f"{config.segments} clip{'s' * (config.segments > 1)} x {config.views} view{'s' * (config.views > 1)}"
    )
    seen = "clips drawn anew in each epoch" if config.augment else "the same clips in each epoch"
    settings = len(config.lr) * len(config.weight_decay)
    if settings == 1:
        choice = f"lr {config.lr[0]:g}, weight decay {config.weight_decay[0]:g}, last epoch, nothing selected"
    elif split == TEST:
        choice = f"last epoch, the best of {settings} settings on {VAL!r}"
    else:
        choice = (
            f"last epoch, the best of {settings} settings on the clips that it is reported on (there is no"
            f" {TEST!r}), so on the high side"
        )
    return f"{blocks}, {clips}, {seen}, {config.epochs} epochs of {config.batch_size} clips a step, {choice}"


def table(results: Results, facts: Mapping[str, Any], *, split: str, caption: str) -> Table:
    """Accuracy and 95% interval of each encoder on each label, and chance level."""
    shown = Table(title=f"Frozen-backbone probe, accuracy on the {split} split", caption=caption)
    shown.add_column("encoder")
    for label, fact in facts.items():
        shown.add_column(f"{label} ({fact['num_classes']} classes)", justify="right")
    for name, row in results.items():
        shown.add_row(
            name,
            *(
                f"[bold]{row[label].score.accuracy:.3f}[/]  [dim]{_interval(row[label].score)}[/]"
                for label in facts
            ),
        )
    shown.add_section()
    shown.add_row("[dim]chance[/]", *(f"[dim]{fact['chance']:.3f}[/]" for fact in facts.values()))
    return shown


def write(config: ProbeConfig, results: Results, facts: Mapping[str, Any], split: str) -> None:
    """The JSON file; beside it, a table of the classes and a picture for each encoder and label."""
    scores = {name: {label: found.score for label, found in row.items()} for name, row in results.items()}
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if results:
        write_whole(out.with_name(f"{out.stem}.classes.tsv"), _classes(results, facts))
        for name, row in results.items():
            for label, found in row.items():
                slug = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{name.strip('/')}-{label}")
                picture = out.with_name(f"{out.stem}.confusion") / f"{slug}.png"
                _draw(
                    picture,
                    found,
                    facts[label]["class_names"],
                    f"{name}, {label}: accuracy {found.score.accuracy:.3f} on {split}",
                )
    result = {
        "accuracy": {
            name: {label: value.accuracy for label, value in row.items()} for name, row in scores.items()
        },
        "interval": {
            name: {label: value.interval for label, value in row.items()} for name, row in scores.items()
        },
        "num_correct": {
            name: {label: value.num_correct for label, value in row.items()} for name, row in scores.items()
        },
        "setting": {
            name: {label: _setting(found) for label, found in row.items()} for name, row in results.items()
        },
        "labels": facts,
        "reported_on": split,
        "protocol": protocol(config, split),
    }
    write_whole(out, json.dumps(result, indent=2) + "\n")


def _setting(found: Found) -> dict[str, float | None]:
    """The setting, and the accuracy that it was chosen for."""
    return found.setting._asdict() | {
        "val_accuracy": None if found.chosen_by is None else found.chosen_by.accuracy
    }


def _classes(results: Results, facts: Mapping[str, Any]) -> str:
    """Accuracy and interval for each class, tab-separated; classes without clips have none."""
    lines = ["encoder\tlabel\tclass\tnum_clips\tnum_correct\taccuracy\tlow\thigh\tmost_taken_for"]
    for name, row in results.items():
        for label, found in row.items():
            class_names = facts[label]["class_names"]
            for number, taken in enumerate(found.counts):
                num_clips, num_correct = int(taken.sum()), int(taken[number])
                if num_clips:
                    score = Score(num_correct=num_correct, num_clips=num_clips)
                    others = taken.clone()
                    others[number] = 0
                    other = class_names[int(others.argmax())] if others.any() else ""
                    numbers = "\t".join(f"{value:.4f}" for value in (score.accuracy, *score.interval))
                    lines.append(
                        f"{name}\t{label}\t{class_names[number]}\t{num_clips}\t{num_correct}\t{numbers}\t{other}"
                    )
    return "\n".join(lines) + "\n"


def _draw(path: Path, found: Found, class_names: Sequence[str], title: str) -> None:
    """The confusion matrix: each row sums to 1."""
    from matplotlib.figure import Figure

    counts = found.counts.double()
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


def _interval(value: Score) -> str:
    low, high = value.interval
    return f"{low:.3f}-{high:.3f}"
