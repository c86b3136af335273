"""What the study's students saved by sharing teachers: counted from the runs."""

from dataclasses import dataclass

from benchmarks.study.record import Entry, Record


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
    num_shared: int
    """Teachers of two or more students."""
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


def sharing(record: Record) -> Sharing | None:
    """Of all students that have finished; none where there is none."""
    shared, apart, num_shared, uncached_forwards = [], [], 0, 0
    training: list[float] = []
    training_apart = 0.0
    for targets, students in _students(record).items():
        found, hours = record[targets].found, record[targets].cpu_s / 3600
        one = Cost(forwards=found["rows"], hours=hours, num_bytes=found["num_bytes"])
        shared.append(one)
        apart += [one] * len(students)
        num_shared += len(students) > 1
        uncached_forwards += sum(of.found["steps"] * of.found["batch_size"] for of in students)
        teacher_hours = record[targets.removesuffix("-targets")].cpu_s / 3600
        training.append(teacher_hours)
        training_apart += teacher_hours * len(students)
    if not shared:
        return None
    return Sharing(
        num_teachers=len(shared),
        num_students=len(apart),
        num_shared=num_shared,
        shared=_sum(shared),
        apart=_sum(apart),
        uncached_forwards=uncached_forwards,
        training_hours=sum(training),
        training_hours_apart=training_apart,
    )


def _students(record: Record) -> dict[str, list[Entry]]:
    """The finished students, by the name of the cache that they read."""
    found: dict[str, list[Entry]] = {}
    for entry in record.values():
        if targets := entry.found.get("targets"):
            found.setdefault(targets, []).append(entry)
    return found


def _sum(costs: list[Cost]) -> Cost:
    return Cost(
        forwards=sum(one.forwards for one in costs),
        hours=sum(one.hours for one in costs),
        num_bytes=sum(one.num_bytes for one in costs),
    )
