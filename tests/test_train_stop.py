"""A run that is told to stop: it has a checkpoint of its last step, and goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_tools import SMALL, losses, salt, train_teacher
from command_tools import STEPS as COMMAND_STEPS
from train_tools import ALONE, RandomClips, small_run

from salt_distill.common import termination
from salt_distill.common.config import TrainConfig, VJepaRun
from salt_distill.common.model import checkpoint as checkpoints
from salt_distill.student_trainer import loop, record
from salt_distill.student_trainer.run_directory import (
    check_run,
    claimed,
    read_metrics,
    says_how_to_go_on,
)
from salt_distill.student_trainer.vjepa import VJepa

NANO = {"batch_size": 6, "view": {"num_frames": 2, "frame_step": 1, "crop_size": 16}, "log_every": 1}
NANO["optim"] = {"warmup_steps": 1, "clip_grad": 1e9}
STEPS, STOPPED = 5, 3
SCRIPT = Path(__file__).parents[1] / "deploy" / "slurm.sh"


def run_of(out: Path, **values) -> TrainConfig:
    return small_run(VJepaRun, **NANO | {"out": str(out), "steps": STEPS} | values)


def train(config: TrainConfig) -> None:
    """As the command does, to its end or to the signal."""
    check_run(config)
    clips = RandomClips(config.view.clip_shape)
    with (
        termination.ended_by_signals(),
        says_how_to_go_on(config),
        claimed(config) as start,
    ):
        loop.train_on(clips, (), config, ALONE, start)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _signals(monkeypatch):
    """Nothing ends this process, and it hears of a signal again after the test."""
    torch.set_num_threads(1)
    monkeypatch.setattr(termination, "_timers", timers := [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for timer in timers:
        timer.cancel()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run without a signal."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    train(run_of(out))
    return out


def files_of(run: Path) -> dict[str, bytes]:
    """Weights at the newest checkpoint."""
    return {path.name: path.read_bytes() for path in checkpoints.find_checkpoint(run).glob("*.safetensors")}


MOMENTS = {
    "before its forward": (loop, "backward", STOPPED),
    "between optimizer and moving average": (VJepa, "move_target_encoder", STOPPED - 1),
    "before it is taken in": (record.RunRecord, "add", STOPPED - 1),
}
"""Of the step after the checkpoint, or of its own: what is called then, and how often it was before."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_leaves_the_last_step_and_the_run_goes_on_to_the_bit(
    moment, number, whole, tmp_path, monkeypatch, capsys
):
    place, name, num_calls = MOMENTS[moment]
    call, save, calls = getattr(place, name), record.save_checkpoint, []

    def called(*arguments, **values):
        calls.append(1)
        if len(calls) == num_calls + 1:
            os.kill(os.getpid(), number)
        return call(*arguments, **values)

    def saved(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)  # the second, while the checkpoint is written
        save(*arguments)

    monkeypatch.setattr(place, name, called)
    monkeypatch.setattr(record, "save_checkpoint", saved)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        train(run_of(out))
    assert ended.value.code == 128 + number
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{STOPPED}"]
    assert len(read_metrics(out)) == STOPPED
    said = " ".join(capsys.readouterr().err.split())
    assert f"the newest checkpoint is checkpoints/step-{STOPPED}: go on" in said
    assert "--resume" in said
    monkeypatch.undo()
    signal.signal(number, signal.SIG_DFL)
    train(run_of(out, resume=True))
    assert losses(out) == losses(whole)
    assert files_of(out) == files_of(whole)


def test_a_signal_before_the_first_step_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "backward", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(run_of(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "--resume" not in capsys.readouterr().err


def test_no_checkpoint_is_older_than_the_minutes_that_it_may_be(tmp_path):
    for minutes, steps in ((1e-9, range(1, STEPS + 1)), (60, [STEPS])):
        out = tmp_path / f"{minutes}"
        train(run_of(out, keep_minutes=minutes))
        names = {path.name for path in (out / "checkpoints").iterdir()}
        assert names == {f"step-{step}" for step in steps}


# --- commands ---


def begin(*arguments: object) -> subprocess.Popen[str]:
    """A command that hears Ctrl-C, which a shell's background ignores."""
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "salt-train"), *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(run: Path, num_steps: int, alive) -> None:
    """Returns when a run has so many lines of metrics."""
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < num_steps:
        assert alive()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_command_that_is_told_to_stop_goes_on_to_the_bit(workers, shards, tmp_path):
    places = [] if workers == 0 else ["--cpus-per-worker", 0.5]
    arguments = ["vjepa", "--data", shards, "--workers", workers, *places, *SMALL]
    salt("salt-train", *arguments, "--out", tmp_path / "whole")
    stopped = tmp_path / "stopped"
    for number, num_steps in ((signal.SIGTERM, 5), (signal.SIGINT, 20)):
        again = ["--resume"] if stopped.exists() else []
        process = begin(*arguments, "--out", stopped, *again)
        wait_for_steps(stopped, num_steps, lambda running=process: running.poll() is None)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, "Traceback" in said) == (128 + number, False), said
        num_steps = len(read_metrics(stopped))
        assert f"the newest checkpoint is checkpoints/step-{num_steps}: go on" in said
    salt("salt-train", *arguments, "--out", stopped, "--resume")
    assert losses(stopped) == losses(tmp_path / "whole")
    assert files_of(stopped) == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_the_slurm_script_puts_itself_back_until_the_run_is_done(shards, tmp_path):
    teacher = train_teacher(shards, tmp_path / "teacher")
    arguments = ["student", "--teacher-ckpt", teacher, "--data", shards, "--workers", 0, *SMALL]
    script = ["bash", SCRIPT, tmp_path / "run", *arguments]
    queue = tmp_path / "queue"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {queue}\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    codes, num_steps = [], 0
    for number in range(1, 4):
        process = subprocess.Popen(
            [*map(str, script)],
            env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7"},
            start_new_session=True,
        )
        if number < 3:
            wait_for_steps(tmp_path / "run", num_steps + 5, lambda running=process: running.poll() is None)
            process.send_signal(signal.SIGTERM)
        codes.append(process.wait(timeout=120))
        num_steps = len(read_metrics(tmp_path / "run"))
        assert queue.read_text() == "requeue 7\n" * min(number, 2)
    assert codes == [143, 143, 0]
    assert num_steps == COMMAND_STEPS
