"""A run on disk: who may train in it, its configuration, its checkpoint, its metrics."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import yaml

from salt_distill.common.config import TrainConfig, dump_yaml, load_yaml
from salt_distill.common.console import say
from salt_distill.common.model.checkpoint import POINTER, find_checkpoint
from salt_distill.common.untouched import left_as_it_was
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.resume import continued, require_more_steps, schedule_change
from salt_distill.student_trainer.storage import fetch_newer, stored_config

CLAIM_S = 30.0
"""How long a start waits for the run's last process to end, in seconds."""
_LOCK = ".lock"
"""File that the process which trains has locked."""


def check_run(config: TrainConfig) -> None:
    """Raises ValueError where ``out`` or ``storage`` holds another run and ``--resume`` is off, or where the
    continuation would learn something else. Writes nothing."""
    out = Path(config.out)
    path = out / "config.yaml"
    if out.exists() and not out.is_dir():
        raise ValueError(f"got --out {out}, which is a file: expected a directory, or the name of a new one")
    stored = None if config.storage is None or path.exists() else stored_config(config.storage)
    started = path.exists() or stored is not None
    where = f"--out {out}" if path.exists() else f"--storage {config.storage}"
    if (_has_begun(out) or stored is not None) and not config.resume:
        raise ValueError(
            f"got {where}, which holds a run already: add --resume to continue it, or choose another"
            " directory"
        )
    if config.resume and not started:
        raise ValueError(f"got --resume for {out}, which holds no run: leave --resume out to start one")
    if config.resume:
        continued(load_yaml(path) if stored is None else yaml.safe_load(stored), config, out)
        require_more_steps(config, _newest_step(out), out)


@contextmanager
def claimed(config: TrainConfig) -> Iterator[Path | None]:
    """The checkpoint that the run goes on from, None: its beginning. Every start asks for it, and no other
    process trains in ``out`` inside the block; only with that certain is anything written there.

    Writes ``config.yaml``. Fetches the checkpoint where ``storage`` has a newer one, for workers that start
    on another machine, and cuts ``metrics.jsonl`` after it: what follows is trained again. Raises ValueError
    where another process stays: after a kill the workers of the killed command end by themselves, but not at
    once.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    try:  # flock, which ends with the process, however that ends
        lock = filelock.UnixFileLock(out / _LOCK, timeout=CLAIM_S, poll_interval=0.1).acquire()
    except filelock.Timeout as error:
        raise ValueError(
            f"got {out}, in which another process trains since {CLAIM_S:g} s: end it, or choose another"
            " directory"
        ) from error
    with lock:
        if config.storage is not None:
            fetch_newer(config.storage, out)
        checkpoint = find_checkpoint(out) if (out / POINTER).exists() else None
        step = _newest_step(out)
        _write_config(config, step)
        _cut_metrics(out / "metrics.jsonl", step)
        yield checkpoint


def _write_config(config: TrainConfig, step: int) -> None:
    """``config.yaml``, in place of one that the run goes on from after ``step``: also a start of the same
    command that lost its workers goes on."""
    path = Path(config.out) / "config.yaml"
    stored = None if config.storage is None or path.exists() else stored_config(config.storage)
    if stored is not None or (path.exists() and (config.resume or _has_begun(path.parent))):
        values = load_yaml(path) if stored is None else yaml.safe_load(stored)
        before = continued(values, config, path.parent)
        if not config.resume and before != config:
            raise ValueError(
                f"got --out {path.parent}, in which another command began a run just now: choose another"
                " directory"
            )
        require_more_steps(config, step, path.parent)
        if step > 0 and (sentence := schedule_change(before, config, step)) is not None:
            print(f"{path.parent}: {sentence}", flush=True)
    write_whole(path, dump_yaml(config))


@contextmanager
def says_how_to_go_on(config: TrainConfig) -> Iterator[None]:
    """A block that trains; where a signal ends it, says how to go on. What cleans up after it, such as a Ray
    on a busy machine, may be cut short."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        pointer = Path(config.out) / POINTER
        if pointer.exists():
            say(
                f"{config.out}: stopped, the newest checkpoint is {pointer.read_text().strip()}: go on from"
                " there by the same command with --resume"
            )
        elif config.storage is not None:
            say(f"{config.storage}: stopped: go on by the same command with --resume")
        raise


@contextmanager
def no_trace_of_a_failed_start(config: TrainConfig) -> Iterator[None]:
    """A block that trains. Where it ends with an error before there is anything to go on from, ``out`` is
    what it was before."""
    out = Path(config.out)

    def is_of_use() -> bool:
        return _has_begun(out) or _is_claimed(out)

    with left_as_it_was(out, unless=is_of_use):
        yield


def _has_begun(out: Path) -> bool:
    """Whether a run in ``out`` came to its first line of metrics, or to a checkpoint: one that its data or
    its teacher stopped before may be begun anew."""
    metrics = out / "metrics.jsonl"
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    return (out / "config.yaml").exists() and (has_metrics or (out / POINTER).exists())


def _is_claimed(out: Path) -> bool:
    """Whether another process trains in ``out``."""
    if not (out / _LOCK).exists():
        return False
    try:
        filelock.UnixFileLock(out / _LOCK, timeout=0).acquire().lock.release()
    except filelock.Timeout:
        return True
    return False


def _newest_step(out: Path) -> int:
    """Steps done at the newest checkpoint; 0 without one."""
    pointer = out / POINTER
    return int(pointer.read_text().strip().rpartition("step-")[2]) if pointer.exists() else 0


def _cut_metrics(path: Path, step: int) -> None:
    """Ends the file after the line of ``step``, in place: whoever follows it finds it shorter."""
    if path.exists():
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        os.truncate(path, sum(map(len, lines)))


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # the last line of a killed run may be cut off
        return float("inf")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The whole lines of ``metrics.jsonl``, also of other versions; none without the file. The last one
    of a killed run may be cut off."""
    path = Path(run) / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]
