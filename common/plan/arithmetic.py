"""Pace, time, bytes and money of students that share a teacher: docs/planning.md explains each formula. Plain
numbers in, plain numbers out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, kw_only=True)
class PlannedTeacher:
    """A frozen teacher on one GPU."""

    clips_per_s: float
    """Its forward."""
    target_bytes: int
    """One clip's target, as it is sent and stored."""
    clip_bytes: int
    """One clip's pixels."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """Student runs of one size."""

    name: str
    runs: int = 1
    gpus: int
    """Of each run."""
    clips_per_s: float
    """Its step on one GPU, targets being there."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each of the runs does."""

    num_slots: int
    """Clips that a run trains on: steps times batch size."""
    num_distinct: int
    """Targets that a cache holds for it."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Machines and prices."""

    link_bytes_per_s: float
    """A GPU's share of its machine's link, each way."""
    decode_clips_per_s: float
    """The cores beside one GPU."""
    disk_bytes_per_s: float
    """All readers, or all writers, together."""
    disk_bytes: float = math.inf
    """Room on it."""
    num_gpus: int | None = None
    """GPUs that there are; None: as many as asked for."""
    gpu_hour_price: float
    tb_month_price: float
    keep_months: float | None = None
    """Months that a cache is kept; None: while the work takes."""


class Limit(NamedTuple):
    """What something would allow if nothing else were slower."""

    what: str
    clips_per_s: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to give the students their targets, and what it costs."""

    name: str
    """serve, serve by size, cache or in-process."""
    replicas: int = 0
    """Teacher replicas while the students train."""
    limits: tuple[Limit, ...]
    """Of the slowest student, in clips per second of that one run; the least is the run's pace."""
    prepare_hours: float = 0.0
    """Before the students begin."""
    train_hours: float
    """Until the last student is done."""
    student_gpu_hours: float
    teacher_gpu_hours: float
    forwards: int
    """Clips that a teacher computes."""
    bytes_to_teacher: int = 0
    bytes_from_teacher: int = 0
    disk_bytes: int = 0
    gpu_price: float
    disk_price: float = 0.0
    refused: str | None = None
    """Why this choice can't be had."""

    @property
    def binding(self) -> Limit:
        """What sets the pace."""
        return min(self.limits, key=lambda limit: limit.clips_per_s)

    @property
    def hours(self) -> float:
        """From the first forward to the last step."""
        return self.prepare_hours + self.train_hours

    @property
    def gpu_hours(self) -> float:
        """Students and teacher."""
        return self.student_gpu_hours + self.teacher_gpu_hours

    @property
    def price(self) -> float:
        """GPUs and disk."""
        return self.gpu_price + self.disk_price


def serve(
    teacher: PlannedTeacher, students: Sequence[Student], work: Work, site: Site, *, replicas: int | None
) -> Choice:
    """One teacher for all: each clip is uploaded and computed once, and every student gets its target.

    Students that share keep together (`--group`), so all have the pace of the slowest. ``replicas`` None: as
    many as that pace needs.
    """
    sharing = num_runs(students)
    limits: list[Limit] = []
    for student in students:
        link = student.gpus * site.link_bytes_per_s
        limits += [
            *_own_limits(student, student.gpus * student.clips_per_s, site),
            Limit(f"link of {student.name}, targets", link / teacher.target_bytes),
            Limit(f"link of {student.name}, pixels", sharing * link / teacher.clip_bytes),
        ]
    of_replica = [
        Limit("GPUs of the teacher", teacher.clips_per_s),
        Limit("link of the teacher, targets", site.link_bytes_per_s / teacher.target_bytes / sharing),
        Limit("link of the teacher, pixels", site.link_bytes_per_s / teacher.clip_bytes),
    ]
    if replicas is None:
        replicas = math.ceil(_pace(limits) / _pace(of_replica) - 1e-9)
    limits += [Limit(limit.what, replicas * limit.clips_per_s) for limit in of_replica]
    wanted = _num_gpus(students) + replicas
    limits += _turns(
        wanted, math.fsum(s.runs / s.clips_per_s for s in students) + 1 / teacher.clips_per_s, site
    )
    hours = work.num_slots / _pace(limits) / 3600
    gpu_hours = _held(wanted, site) * hours
    return Choice(
        name="serve",
        replicas=replicas,
        limits=tuple(limits),
        train_hours=hours,
        student_gpu_hours=gpu_hours * (1 - replicas / wanted),
        teacher_gpu_hours=gpu_hours * replicas / wanted,
        forwards=work.num_slots,
        bytes_to_teacher=work.num_slots * teacher.clip_bytes,
        bytes_from_teacher=sharing * work.num_slots * teacher.target_bytes,
        gpu_price=gpu_hours * site.gpu_hour_price,
    )


def serve_by_size(teacher: PlannedTeacher, students: Sequence[Student], work: Work, site: Site) -> Choice:
    """A group, and teacher replicas, for each size: a clip is computed once per size, and nobody waits for a
    larger student."""
    groups = [serve(teacher, [student], work, site, replicas=None) for student in students]
    slowest = max(groups, key=lambda group: group.hours)
    return replace(
        slowest,
        name="serve by size",
        replicas=sum(group.replicas for group in groups),
        student_gpu_hours=math.fsum(group.student_gpu_hours for group in groups),
        teacher_gpu_hours=math.fsum(group.teacher_gpu_hours for group in groups),
        forwards=sum(group.forwards for group in groups),
        bytes_to_teacher=sum(group.bytes_to_teacher for group in groups),
        bytes_from_teacher=sum(group.bytes_from_teacher for group in groups),
        gpu_price=math.fsum(group.gpu_price for group in groups),
    )


def cache(teacher: PlannedTeacher, students: Sequence[Student], work: Work, site: Site) -> Choice:
    """Targets on disk first, computed on the students' GPUs; then students without a teacher, each at its own
    pace."""
    wanted, disk = _num_gpus(students), site.disk_bytes_per_s / teacher.target_bytes
    common = [
        Limit("disk", disk / num_runs(students)),
        *_turns(wanted, math.fsum(student.runs / student.clips_per_s for student in students), site),
    ]
    held = _held(wanted, site)
    prepare_hours = (
        work.num_distinct / min(held * teacher.clips_per_s, held * site.decode_clips_per_s, disk) / 3600
    )
    limits = [
        [*_own_limits(student, student.gpus * student.clips_per_s, site), *common] for student in students
    ]
    hours = [work.num_slots / _pace(own) / 3600 for own in limits]
    student_gpu_hours = _gpu_hours(students, hours) * held / wanted
    disk_bytes = work.num_distinct * teacher.target_bytes
    months = (prepare_hours + max(hours)) / HOURS_PER_MONTH if site.keep_months is None else site.keep_months
    return Choice(
        name="cache",
        limits=tuple(min(limits, key=_pace)),
        prepare_hours=prepare_hours,
        train_hours=max(hours),
        student_gpu_hours=student_gpu_hours,
        teacher_gpu_hours=held * prepare_hours,
        forwards=work.num_distinct,
        disk_bytes=disk_bytes,
        gpu_price=(student_gpu_hours + held * prepare_hours) * site.gpu_hour_price,
        disk_price=disk_bytes / 1e12 * months * site.tb_month_price,
        refused=None
        if disk_bytes <= site.disk_bytes
        else f"{disk_bytes / 1e12:,.1f} TB of targets, room for {site.disk_bytes / 1e12:,.1f}",
    )


def in_process(teacher: PlannedTeacher, students: Sequence[Student], work: Work, site: Site) -> Choice:
    """A teacher in every student's own GPUs: the two take turns there, and every run computes every clip."""
    wanted = _num_gpus(students)
    seconds = [1 / student.clips_per_s + 1 / teacher.clips_per_s for student in students]
    turns = _turns(
        wanted, math.fsum(student.runs * each for student, each in zip(students, seconds, strict=True)), site
    )
    limits = [
        [*_own_limits(s, s.gpus / each, site), *turns] for s, each in zip(students, seconds, strict=True)
    ]
    hours = [work.num_slots / _pace(own) / 3600 for own in limits]
    held = _held(wanted, site) / wanted
    gpu_hours = held * _gpu_hours(students, hours)
    teacher_hours = [hour / each / teacher.clips_per_s for hour, each in zip(hours, seconds, strict=True)]
    teacher_gpu_hours = held * _gpu_hours(students, teacher_hours)
    return Choice(
        name="in-process",
        limits=tuple(min(limits, key=_pace)),
        train_hours=max(hours),
        student_gpu_hours=gpu_hours - teacher_gpu_hours,
        teacher_gpu_hours=teacher_gpu_hours,
        forwards=num_runs(students) * work.num_slots,
        gpu_price=gpu_hours * site.gpu_hour_price,
    )


def best(choices: Sequence[Choice]) -> Choice:
    """The cheapest that can be had; of equal ones the fastest."""
    return min(
        (choice for choice in choices if choice.refused is None),
        key=lambda choice: (choice.price, choice.gpu_hours, choice.hours),
    )


def sharing_gain(teacher_share: float, num_students: int) -> float:
    """Share of a run's compute that each of so many students saves when one teacher serves all."""
    return teacher_share * (1 - 1 / num_students)


def passes_per_month(teacher: PlannedTeacher, site: Site) -> float:
    """Passes a month from which on keeping a target costs less than computing it again."""
    forward_price = site.gpu_hour_price / 3600 / teacher.clips_per_s
    return (
        math.inf if forward_price == 0 else teacher.target_bytes / 1e12 * site.tb_month_price / forward_price
    )


def num_runs(students: Sequence[Student]) -> int:
    """Runs in all."""
    return sum(student.runs for student in students)


def _num_gpus(students: Sequence[Student]) -> int:
    return sum(student.runs * student.gpus for student in students)


def _gpu_hours(students: Sequence[Student], hours: Sequence[float]) -> float:
    return math.fsum(
        student.runs * student.gpus * hour for student, hour in zip(students, hours, strict=True)
    )


def _pace(limits: Sequence[Limit]) -> float:
    return min(limit.clips_per_s for limit in limits)


def _own_limits(student: Student, on_gpus: float, site: Site) -> list[Limit]:
    return [
        Limit(f"GPUs of {student.name}", on_gpus),
        Limit(f"decoding of {student.name}", student.gpus * site.decode_clips_per_s),
    ]


def _held(wanted: int, site: Site) -> int:
    """GPUs that are held."""
    return wanted if site.num_gpus is None else min(wanted, site.num_gpus)


def _turns(wanted: int, gpu_seconds: float, site: Site) -> list[Limit]:
    """Where fewer GPUs are there than wanted: the pace at which they do, in turns, what all of them do for
    one slot of each run."""
    held = _held(wanted, site)
    return [Limit("GPUs that there are", held / gpu_seconds)] if held < wanted else []
