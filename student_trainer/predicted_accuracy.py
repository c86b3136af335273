"""The accuracy that a run's held-out loss predicts: a line through the probed checkpoints of other students
of its teacher, measured on the same held-out clips (arXiv:2509.24317, Figure 3)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import JsonValue

from salt_distill.common.config import FrozenConfig, StudentRun, dump_yaml, load_yaml
from salt_distill.common.data.reader import Reader
from salt_distill.common.data.shards import open_dataset
from salt_distill.common.model.checkpoint import POINTER, open_encoder, read_config
from salt_distill.common.model.teacher import fingerprint
from salt_distill.student_trainer.evaluation.candidates import checkpoint_name
from salt_distill.student_trainer.evaluation.finished_runs import is_run
from salt_distill.student_trainer.evaluation.held_out import checkpoints
from salt_distill.student_trainer.evaluation.probe.results import ProbeResults, chosen_label
from salt_distill.student_trainer.evaluation.selection import FittedLine, fit, num_places
from salt_distill.student_trainer.run_directory import read_metrics

FEWEST_POINTS = 4
"""Probed checkpoints with different held-out losses that a prediction needs: a line and two more."""
_SAME = ("data_seed", "split", "val_clips", "view", "mask", "target_dtype")
"""What decides the held-out task of a run, beside its data set and its teacher."""
_ROOM = 0.5
"""How far beyond the probed losses the line is believed, of their range on each side."""


@dataclass(frozen=True)
class AccuracyLine:
    """Accuracy against held-out loss, for losses from ``low`` to ``high``."""

    line: FittedLine
    low: float
    high: float

    def at(self, val_loss: float) -> dict[str, float]:
        """What a line of metrics says of this loss; nothing where it is too far from all that were probed."""
        if not self.low <= val_loss <= self.high:
            return {}
        names = ("predicted_accuracy", "predicted_low", "predicted_high")
        return {
            name: min(1.0, max(0.0, value))
            for name, value in zip(names, self.line.predict(val_loss), strict=True)
        }


def read_accuracy_line(
    config: StudentRun, reader: Reader, teacher_fingerprint: str
) -> tuple[AccuracyLine | None, str]:
    """The line of the runs in ``predict_from``, and a sentence about it; None where they are too few, and
    why. Raises ValueError where there is no probe, or its label is not told."""
    folder = Path(config.predict_from or "")
    path = folder / "probe.json"
    probe = ProbeResults.read(path)
    label = chosen_label(probe.labels, config.predict_label, path, flag="--predict-label")
    points, left_out = [], list[str]()
    for run in sorted(path for path in folder.iterdir() if is_run(path)):
        if run.resolve() == Path(config.out).resolve():
            continue
        if (why := _why_other(run, config, reader, teacher_fingerprint)) is not None:
            left_out.append(f"{run.name}: {why}")
            continue
        found = list(_points(run, probe, label))
        points += found
        if not found:
            left_out.append(f"{run.name}: no checkpoint with a held-out loss was probed")
    xs = [x for x, _ in points]
    line = fit(xs, [accuracy for _, accuracy in points])
    but = f" Left out: {'; '.join(left_out)}." if left_out else ""
    if line is None or num_places(xs) < FEWEST_POINTS:
        return None, (
            f"no accuracy is predicted: got {num_places(xs)} probed checkpoints with different held-out"
            f" losses in {folder}, expected {FEWEST_POINTS} at least, of students of this teacher with the"
            f" same held-out clips.{but}"
        )
    room = _ROOM * (max(xs) - min(xs))
    found_line = AccuracyLine(line, min(xs) - room, max(xs) + room)
    return found_line, (
        f"accuracy of {label} is predicted by {line.num_points} probed checkpoints in {folder}: R\u00b2"
        f" {line.r2:.2f}, for held-out losses from {found_line.low:.4f} to {found_line.high:.4f}.{but}"
    )


def _why_other(run: Path, config: StudentRun, reader: Reader, teacher_fingerprint: str) -> str | None:
    """Why the held-out losses of a run say nothing about this one's; None where they do."""
    values: Mapping[str, JsonValue] = load_yaml(run / "config.yaml")
    if not (run / POINTER).is_file():
        return "it has no checkpoint"
    if read_config(run).teacher_fingerprint != (teacher_fingerprint,):
        return "another teacher, or none"
    if values.get("val_every") is None:
        return "trained without --val-every"
    mine = yaml.safe_load(dump_yaml(config))
    if other := [key for key in _SAME if values.get(key) != mine[key]]:
        return f"another {', '.join(other)}"
    try:
        index_hash = open_dataset(str(values["data"])).index_hash
    except (ValueError, OSError):
        return f"its data set {values['data']} cannot be read"
    return None if index_hash == reader.index_hash else "another data set"


def _points(run: Path, probe: ProbeResults, label: str) -> Iterator[tuple[float, float]]:
    """Held-out loss and accuracy of each checkpoint that has both."""
    losses = {line["step"]: line["val_loss"] for line in read_metrics(run) if "val_loss" in line}
    for checkpoint in checkpoints(run):
        loss = losses.get(read_config(checkpoint).step)
        if loss is None:
            continue
        encoder = open_encoder(FrozenConfig(ckpt=str(checkpoint)))
        row = probe.named(fingerprint(encoder, encoder.load()), checkpoint_name(str(checkpoint)))
        if row is not None:
            yield loss, probe.accuracy[row][label]
