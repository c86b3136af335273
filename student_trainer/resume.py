"""What a run may change when it is continued, and where it stands. ``python -m
salt_distill.student_trainer.resume`` writes the table of docs/training.md."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pydantic
from torch import Tensor

from salt_distill.common.config import (
    Config,
    ConfigValues,
    StudentRun,
    TeacherRun,
    TrainConfig,
    VJepaRun,
    explain,
)
from salt_distill.common.config.marks import OnResume, marked
from salt_distill.common.data.reader import Reader
from salt_distill.student_trainer.schedule import ema_momentum, learning_rate, weight_decay

_RUNS = (TeacherRun, StudentRun, VJepaRun)
BEGIN, END = "<!-- what may change on --resume -->\n", "<!-- end -->\n"
"""Around the table in docs/training.md."""


@dataclass(frozen=True, kw_only=True)
class ClipOrder:
    """What decides which clip a slot is."""

    index_hash: str
    """Of the data set's index: keys, sizes, sha256 of every sample."""
    split: str
    """With what is held out of it."""
    data_seed: int
    views: str
    """``fresh``, or the number of pinned views."""
    shuffle_shards: int

    def to_json(self) -> dict[str, str | int]:
        """Plain types."""
        return asdict(self)

    @classmethod
    def of(cls, config: TrainConfig, reader: Reader) -> Self:
        """That of a run."""
        held_out, less = reader.held_out, ""
        if held_out is not None and held_out.is_from_training:
            less = f" without {len(held_out.rows)} held-out clips"
        return cls(
            index_hash=reader.index_hash,
            split=config.split + less,
            data_seed=config.data_seed,
            views=str(config.views),
            shuffle_shards=config.loader.shuffle_shards,
        )


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: what its ``training.pt`` holds beside the state of the optimizer."""

    step: int
    """Optimizer steps done."""
    slot: int
    """The next slot of the data order."""
    rng: Tensor
    """torch's generator."""
    teacher: str | None
    """Each teacher's TeacherSpec as JSON, a line each; None without one."""
    clips: dict[str, str | int] | None = None
    """ClipOrder as a dictionary; None in a checkpoint of version 1.1 or older."""
    bad_clips: int = 0
    """Clips before ``slot`` that could not be decoded."""
    best: tuple[int, float, int] | None = None
    """``Best`` of a run with a held-out loss, as a plain tuple."""

    def require_clips(self, now: ClipOrder, data: str) -> None:
        """Raises ValueError where ``data`` would give other clips than those that the run began with."""
        for name, value in now.to_json().items():
            if self.clips is not None and self.clips[name] != value:
                raise ValueError(
                    f"--resume: the run learned from clips with {name}={self.clips[name]}, {data} has"
                    f" {name}={value}: give the same data (its address may differ) and the same --val-every,"
                    " or start a new run"
                )


def continued(before: ConfigValues, now: TrainConfig, out: Path) -> TrainConfig:
    """The configuration that a run had ``before``, as its ``config.yaml`` says. Raises ValueError where
    ``now`` would learn something else."""
    try:
        started = type(now).model_validate(before)
    except pydantic.ValidationError as error:
        raise ValueError(
            f"{out}: its config.yaml is none of this kind of run, or is damaged ({explain(error)}): continue"
            " it with the command that started it, or choose another directory"
        ) from error
    free = {key for key, _ in marked(type(now), OnResume)}
    if None in (started.val_every, now.val_every):
        free.add("val_clips")  # of a measurement that is switched on or off
    # Workers write the paths as they mean them everywhere; a command is given them as it likes.
    values_then = dict(_fixed(started.absolute(), free))
    for key, value in _fixed(now.absolute(), free):
        if values_then[key] != value:
            raise ValueError(
                f"--resume: {out} was started with {key}={values_then[key]!r}, got {key}={value!r}: use the"
                " same value, or start a new run"
            )
    return started


def require_more_steps(now: TrainConfig, step: int, out: Path) -> None:
    """Raises ValueError where a run has done more steps than it is to have."""
    if now.steps < step:
        raise ValueError(
            f"--resume: got --steps {now.steps}, but {out} has done {step}: give at least as many, or start a"
            " new run"
        )


def schedule_change(before: TrainConfig, now: TrainConfig, step: int) -> str | None:
    """A sentence where what a schedule gives the step after ``step`` is not what was to come; None where all
    of it is."""
    following = min(step + 1, now.steps)
    expected = _scheduled(before, min(following, before.steps))
    changes = [
        f"{name} goes on at {value:.5g}, not at {expected[name]:.5g}"
        for name, value in _scheduled(now, following).items()
        if not math.isclose(value, expected[name], rel_tol=1e-9)
    ]
    if not changes:
        return None
    return (
        f"{'; '.join(changes)}: --steps {now.steps} with optim.schedule={now.optim.schedule}, before --steps"
        f" {before.steps} with optim.schedule={before.optim.schedule}"
    )


def _scheduled(config: TrainConfig, step: int) -> dict[str, float]:
    """What the schedules of a run give a step."""
    found = {
        "the learning rate": learning_rate(config.optim, step=step, steps=config.steps),
        "weight decay": weight_decay(config.optim, step=step, steps=config.steps),
    }
    if isinstance(config, VJepaRun):
        found["the EMA's momentum"] = ema_momentum(config.ema, step=step, steps=config.steps)
    return found


def table() -> str:
    """Every key that may change on ``--resume``, and what another value does, in Markdown."""
    effects = {key: mark.effect for run in _RUNS for key, mark in marked(run, OnResume)}
    rows = [f"| `{key}` | {effect} |" for key, effect in effects.items()]
    return "\n".join(["| key | another value |", "|---|---|", *rows]) + "\n"


def _fixed(config: Config, free: set[str], above: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that must not change, as ``--set`` names them, and their values."""
    for name, value in config:
        key = above + name
        if key not in free:
            yield from _fixed(value, free, f"{key}.") if isinstance(value, Config) else [(key, value)]


if __name__ == "__main__":
    page = Path(__file__).resolve().parents[1] / "docs" / "training.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2])
