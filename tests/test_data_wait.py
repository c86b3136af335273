"""A run whose steps wait for clips says what would help, once."""

import time

import pytest
from train_tools import metrics_line, small_run

from salt_distill.common.config import TeacherRun
from salt_distill.common.data.shards import Dataset
from salt_distill.student_trainer import data_wait
from salt_distill.student_trainer.data_wait import DataWait
from salt_distill.student_trainer.start import start

ADVICE = "the steps wait for clips"
VALUES = {"steps": 12, "batch_size": 6, "log_every": 2, "workers": 0, "device": "cpu"}


@pytest.mark.parametrize("pause_s", [0.3, 0.0])
def test_a_run_from_a_slow_disk_says_what_helps_once(pause_s, shards, tmp_path, monkeypatch, capsys):
    encoded = Dataset.encoded

    def slow(*arguments):
        time.sleep(pause_s)
        return encoded(*arguments)

    monkeypatch.setattr(Dataset, "encoded", slow)
    monkeypatch.setattr(data_wait, "_LEAST_S", 0.1)
    if pause_s == 0:  # nothing is waited for that is read ahead while a step computes
        monkeypatch.setattr("salt_distill.student_trainer.vpixel.VPixel.forward", _slow_forward())
    loader = {"decode_processes": 1, "prefetch_steps": 1 if pause_s else 3}
    view = {"num_frames": 2, "frame_step": 1, "crop_size": 16}
    start(
        small_run(TeacherRun, **VALUES, data=str(shards), out=str(tmp_path / "run"), loader=loader, view=view)
    )
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(ADVICE) == bool(pause_s)
    if pause_s:
        assert "loader.decode_processes" in said or "more CPUs" in said
        assert "--short-side 18: half of the videos have 40 pixels or more, crops 16" in said


def _slow_forward():
    from salt_distill.student_trainer.vpixel import VPixel

    forward = VPixel.forward

    def slow(*arguments):
        time.sleep(0.1)
        return forward(*arguments)

    return slow


def test_the_first_line_short_runs_and_a_slow_teacher_say_nothing(monkeypatch):
    config = small_run(TeacherRun, workers=2, batch_size=48, address="192.0.2.1:6379", data="s3://none/none")
    waits = {"data_wait_ms": 900.0, "step_ms": 1000.0}

    def said(*lines):
        wait = DataWait(config)
        return [wait.sentence(metrics_line(**line)) for line in lines]

    assert said({"step": 100, **waits}) == [None]
    assert said({"step": 1, **waits}, {"step": 5, **waits}) == [None, None]
    busy = {"data_wait_ms": 400.0, "teacher_wait_ms": 500.0, "step_ms": 1000.0}
    assert said({"step": 1, **busy}, {"step": 50, **busy}) == [None, None]
    first, sentence, again = said({"step": 1, **waits}, {"step": 11, **waits}, {"step": 30, **waits})
    assert first is again is None
    assert sentence.startswith(f"{ADVICE} 90% of their time: keep what is read on a local disk with --set")
    for knob in ("loader.shard_cache_dir=DIR", "loader.decode_processes=4", "salt-data pack --short-side"):
        assert knob in sentence
