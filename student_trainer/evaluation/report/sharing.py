"""What one teacher for many students saved, from the counters of a teacher service."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError, computed_field

from salt_distill.common.config import explain
from salt_distill.common.model.flops import FORWARD_FLOPS
from salt_distill.common.text_files import read_text
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun
from salt_distill.student_trainer.evaluation.report.blocks import (
    Block,
    Heading,
    LargeNumbers,
    Paragraph,
    Section,
)
from salt_distill.student_trainer.evaluation.report.render import quantity


class SharingCounters(BaseModel, frozen=True):
    """Counters of a service that what sharing saved follows from."""

    clips_served: int
    """Targets that students got."""
    clips_computed: int
    """Clips that the teacher ran."""
    coalesced: int
    """Targets sent that another request had already begun."""
    from_memory: int
    """Targets sent that the service still had."""
    shared: int
    """Targets sent that another run had asked for first."""
    bytes_in: int
    """Bytes that students sent."""
    bytes_out: int
    """Bytes that they got."""
    forward_s: float
    """Seconds in the teacher's forward."""

    @classmethod
    def total(cls, *signed: tuple[int, "SharingCounters"]) -> Self:
        """Of counters, each times its sign."""
        values = [(sign, counters.model_dump(include=set(cls.model_fields))) for sign, counters in signed]
        return cls(**{name: sum(sign * each[name] for sign, each in values) for name in cls.model_fields})


NOTHING = SharingCounters(
    clips_served=0,
    clips_computed=0,
    coalesced=0,
    from_memory=0,
    shared=0,
    bytes_in=0,
    bytes_out=0,
    forward_s=0,
)
"""Of a service that has done nothing yet."""


class Sharing(SharingCounters, frozen=True):
    """The service's counters, and what follows from them."""

    clip_bytes: int
    """Bytes of one clip's pixels."""
    forward_flops: int
    """FLOPs of one clip's teacher forward: 2 N D (arXiv:2509.24317, Appendix F)."""

    @computed_field
    @property
    def forwards_avoided(self) -> int:
        """Clips that a run did not have computed, since another one had."""
        return self.shared

    @computed_field
    @property
    def repeated(self) -> int:
        """Targets that cost no forward and no other run's either: those of a run's own earlier epochs, and
        of a cache on disk that was there before the service."""
        return max(0, self.clips_served - self.clips_computed - self.shared)

    @computed_field
    @property
    def flops_saved(self) -> int:
        """FLOPs of those forwards."""
        return self.forwards_avoided * self.forward_flops

    @computed_field
    @property
    def bytes_not_uploaded(self) -> int:
        """Pixels of those clips, in bytes."""
        return self.forwards_avoided * self.clip_bytes


class ServiceStatus(BaseModel, frozen=True):
    """What a report takes of what `salt-serve status --json` prints, or `GET /v1/teacher` answers."""

    clip_shape: tuple[int, int, int, int]
    grid: tuple[int, int, int]
    num_parameters: int
    counters: SharingCounters

    def sharing(self, counters: SharingCounters | None = None) -> Sharing:
        """What sharing this teacher saved; ``counters``: of a part of what the service did, else of all."""
        return Sharing(
            **(counters or self.counters).model_dump(),
            clip_bytes=math.prod(self.clip_shape),
            forward_flops=FORWARD_FLOPS * self.num_parameters * math.prod(self.grid),
        )


def read_status(path: Path) -> Sharing:
    """From the file with what `salt-serve status --json` prints."""
    try:
        return ServiceStatus.model_validate_json(read_text(path)).sharing()
    except ValidationError as error:
        problem = explain(error).splitlines()[0]
        raise ValueError(f"{path}: got {problem}; expected what `salt-serve status --json` prints") from None


def section(shared: Sharing, runs: Sequence[FinishedRun]) -> Section:
    """The service's counters, and what sharing one teacher saved."""
    served = [run.name for run in runs if "service" in run.results.source]
    cached = [run for run in runs if "cache" in run.results.source]
    counters = [
        (f"{shared.clips_served:,}", "targets served"),
        (f"{shared.clips_computed:,}", "clips the teacher computed"),
        (f"{shared.coalesced:,}", "joined a computation under way"),
        (f"{shared.from_memory:,}", "answered from memory"),
        (f"{shared.repeated:,}", "of a run's own earlier epochs, or on disk from before"),
        (quantity(shared.bytes_in, "B"), "received"),
        (quantity(shared.bytes_out, "B"), "sent"),
    ]
    if shared.forward_s > 0:
        counters.append(
            (f"{shared.clips_computed / shared.forward_s:,.0f} clips/s", "in the teacher's forward")
        )
    share = shared.forwards_avoided / max(1, shared.clips_served)
    saved = [
        (
            f"{shared.forwards_avoided:,}",
            f"targets that another run had asked for first, {share:.0%} of those served",
        ),
        (quantity(shared.flops_saved, "FLOP"), "of teacher compute not spent (2ND)"),
        (quantity(shared.bytes_not_uploaded, "B"), "of pixels not uploaded"),
    ]
    against = (
        "Against a teacher for each run, which keeps its targets as this one does: a run's own earlier epochs"
        " are not counted as shared."
    )
    why = "A target depends on the clip alone, so students that share a data seed share their targets."
    blocks: list[Block] = [
        LargeNumbers(counters),
        Heading(f"Saved by sharing: {', '.join(served)}" if served else "Saved by sharing"),
        LargeNumbers(saved),
        Paragraph(f"{against} {why}", quiet=True),
    ]
    for run in cached:
        num_clips = run.results.steps * run.results.batch_size
        sentence = (
            f"{run.name} read its {num_clips:,} targets from the cache on disk, with no teacher running."
        )
        blocks.append(Paragraph(sentence))
    return Section("The teacher service", blocks)
