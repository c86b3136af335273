"""What the study's students saved by sharing teachers: counted from the runs."""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.findings import targets_of
from benchmarks.study.runner import read_ended


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the frozen teachers' work."""

    forwards: int
    """Clips that teachers computed."""
    hours: float
    """Of one core."""
    num_bytes: int
    """Of targets that are kept."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The students of the study, with one cache for all students of a teacher and without it."""

    num_teachers: int
    num_students: int
    shared: Cost
    """As it was run."""
    apart: Cost
    """With a cache for each student."""
    uncached_forwards: int
    """Clips that teachers would compute with a forward for each clip of each step."""
    training_hours: float
    """Of the teachers that were trained, of one core."""
    training_hours_apart: float
    """With a teacher for each student."""


def sharing(root: Path) -> Sharing | None:
    """Of all students in ``root`` that have finished; none where there is none."""
    ended = read_ended(root)
    shared, apart, uncached_forwards = [], [], 0
    training: list[float] = []
    training_apart = 0.0
    for targets, students in _students(root).items():
        name = str(targets.relative_to(root))
        forwards = sum(
            of["rows"] for of in json.loads((targets / "manifest.json").read_text())["files"].values()
        )
        hours = ended[name].cpu_s / 3600
        num_bytes = sum(path.stat().st_size for path in targets.rglob("*") if path.is_file())
        one = Cost(forwards=forwards, hours=hours, num_bytes=num_bytes)
        shared.append(one)
        apart += [one] * len(students)
        for student in students:
            summary = json.loads((student / "summary.json").read_text())
            uncached_forwards += summary["steps"] * summary["batch_size"]
        teacher_hours = ended[name.removesuffix("-targets")].cpu_s / 3600
        training.append(teacher_hours)
        training_apart += teacher_hours * len(students)
    if not shared:
        return None
    return Sharing(
        num_teachers=len(shared),
        num_students=len(apart),
        shared=_sum(shared),
        apart=_sum(apart),
        uncached_forwards=uncached_forwards,
        training_hours=sum(training),
        training_hours_apart=training_apart,
    )


def _students(root: Path) -> dict[Path, list[Path]]:
    """The finished students, by the cache that they read."""
    found: dict[Path, list[Path]] = {}
    for summary in sorted(root.glob("*/seed-*/*/summary.json")):
        if targets := targets_of(summary.parent):
            found.setdefault(targets, []).append(summary.parent)
    return found


def _sum(costs: list[Cost]) -> Cost:
    return Cost(
        forwards=sum(one.forwards for one in costs),
        hours=sum(one.hours for one in costs),
        num_bytes=sum(one.num_bytes for one in costs),
    )
