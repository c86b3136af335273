"""What one teacher for many students saved, from the counters of a teacher service."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The service's counters, and what follows from them."""

    clips_served: int
    """Targets that students got."""
    clips_computed: int
    """Clips that the teacher ran."""
    coalesced: int
    """Targets sent that another request had already begun."""
    from_memory: int
    """Targets sent that the service still had."""
    bytes_in: int
    """Bytes that students sent."""
    bytes_out: int
    """Bytes that they got."""
    forward_s: float
    """Seconds in the teacher's forward."""
    clip_bytes: int
    """Bytes of one clip's pixels."""
    forward_flops: float
    """FLOPs of one clip's teacher forward: 2 N D (arXiv:2509.24317, Appendix F)."""

    @property
    def forwards_avoided(self) -> int:
        """Clips that a teacher in every student's own process would have computed in addition."""
        return self.clips_served - self.clips_computed

    @property
    def flops_saved(self) -> float:
        """FLOPs of those forwards."""
        return self.forwards_avoided * self.forward_flops

    @property
    def bytes_not_uploaded(self) -> int:
        """Bytes that students would have sent more, had each of them uploaded every clip."""
        return max(0, self.clips_served * self.clip_bytes - self.bytes_in)


def read_status(path: Path) -> Sharing:
    """From the file with what `salt-serve status --json` prints."""
    return read_sharing(json.loads(read_text(path)))


def read_sharing(status: dict[str, Any]) -> Sharing:
    """From what `salt-serve status --json` prints."""
    counters = status["counters"]
    return Sharing(
        clips_served=counters["clips_served"],
        clips_computed=counters["clips_computed"],
        coalesced=counters["coalesced"],
        from_memory=counters["from_memory"],
        bytes_in=counters["bytes_in"],
        bytes_out=counters["bytes_out"],
        forward_s=counters["forward_s"],
        clip_bytes=math.prod(status["clip_shape"]),
        forward_flops=FORWARD_FLOPS * status["num_parameters"] * math.prod(status["grid"]),
    )


def section(shared: Sharing, runs: Sequence[FinishedRun]) -> Section:
    """The service's counters, and what sharing one teacher saved."""
    served = [run.name for run in runs if run.results.source == "service"]
    cached = [run for run in runs if run.results.source == "cache"]
    counters = [
        (f"{shared.clips_served:,}", "targets served"),
        (f"{shared.clips_computed:,}", "clips the teacher computed"),
        (f"{shared.coalesced:,}", "joined a computation under way"),
        (f"{shared.from_memory:,}", "answered from memory"),
        (quantity(shared.bytes_in, "B"), "received"),
        (quantity(shared.bytes_out, "B"), "sent"),
    ]
    if shared.forward_s > 0:
        counters.append(
            (f"{shared.clips_computed / shared.forward_s:,.0f} clips/s", "in the teacher's forward")
        )
    share = shared.forwards_avoided / max(1, shared.clips_served)
    saved = [
        (f"{shared.forwards_avoided:,}", f"teacher forwards avoided, {share:.0%} of the targets"),
        (quantity(shared.flops_saved, "FLOP"), "of teacher compute not spent (2ND)"),
        (quantity(shared.bytes_not_uploaded, "B"), "of pixels not uploaded"),
    ]
    against = "Against a teacher that every student runs, and uploads to, for itself."
    why = "A target depends on the clip alone, so students that share a data seed share their targets."
    blocks: list[Block] = [
        LargeNumbers(counters),
        Heading(f"Saved by sharing: {', '.join(served)}"),
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
