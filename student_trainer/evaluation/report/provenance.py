"""Where a report and its runs come from: when and by what it was made, and each run's command, code and
machine."""

import re
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from salt_distill.common.text_files import read_text
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun, UnfinishedRun
from salt_distill.student_trainer.evaluation.report.blocks import Block, CommandLine, Paragraph, Section
from salt_distill.student_trainer.evaluation.report.run_command import command_of
from salt_distill.student_trainer.record import git_commit

_SHORT = 12
"""Digits of a commit that people read."""


class _Start(BaseModel):
    """The part of an entry of ``environment.json`` that people want to know."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    after_step: int = 0
    torch: str
    device: str
    git_commit: str | None = None


_STARTS = TypeAdapter(list[_Start])


def made_on() -> str:
    """The day, and the version of what makes the page."""
    commit = git_commit()
    of = "" if commit is None else f", commit {commit[:_SHORT]}"
    today = datetime.now().astimezone()
    return f"Made on {today.day} {today:%B %Y at %H:%M %Z} by salt-distill {version('salt-distill')}{of}."


def section(runs: Sequence[FinishedRun], unfinished: Sequence[UnfinishedRun]) -> Section:
    """For each run what to type to have it again."""
    blocks: list[Block] = [
        Paragraph(
            "Each command resolves to the configuration that the run has in its config.yaml. It may be"
            " shorter than what was typed.",
            quiet=True,
        )
    ]
    blocks += [
        CommandLine(_origin(run.name, run.path), re.split(r" (?=--)", command_of(run.path)))
        for run in (*runs, *unfinished)
    ]
    return Section("How the runs were made", blocks)


def _origin(name: str, run: Path) -> str:
    """A run's name, with the code and the machine of its newest start where they are known."""
    path = run / "environment.json"
    starts = _STARTS.validate_json(read_text(path)) if path.is_file() else []
    if not starts:
        return name
    newest = starts[-1]
    parts = [] if newest.git_commit is None else [f"commit {newest.git_commit[:_SHORT]}"]
    parts += [f"torch {newest.torch}", f"on {newest.device}"]
    if len(starts) > 1:
        parts.append(f"started {len(starts)} times, the newest after step {newest.after_step}")
    return f"{name}: {', '.join(parts)}"
