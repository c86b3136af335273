"""A small student of a teacher service, and its losses: what the tests of faults share."""

import json
from pathlib import Path
from typing import Any

from train_tools import ALONE, RandomClips, small_run

from salt_distill.common.config import StudentRun
from salt_distill.student_trainer.loop import train_on
from salt_distill.student_trainer.targets.source import TargetSource, open_sources

VIEW = {"num_frames": 4, "frame_step": 1, "crop_size": 16}
CLIENT = {"request_clips": 8, "connections": 2, "timeout_s": 10, "retry_budget_s": 20}


def run_of(out: Path, url: str, *, client: dict | None = None, **values) -> StudentRun:
    """A run of six steps, whose folder is there."""
    config = small_run(
        StudentRun,
        **{
            "steps": 6,
            "out": str(out),
            "teacher_url": url,
            "view": VIEW,
            "log_every": 1,
            "client": CLIENT | (client or {}),
        }
        | values,
    )
    assert isinstance(config, StudentRun)
    out.mkdir()
    return config


def open_source(config: StudentRun, **values: Any) -> TargetSource:
    """Of a run with one teacher."""
    return next(open_sources(config, **values))


def train(config: StudentRun, source: TargetSource, clips: RandomClips | None = None) -> list[float]:
    """The losses of a run."""
    train_on(clips or RandomClips(config.view.clip_shape), [source], config, ALONE, None)  # type: ignore[arg-type]
    return [
        json.loads(line)["loss"] for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    ]
