"""What a run may not lie about: its checkpoints' bytes, its clips, its steps, what others wrote."""

import json
import time
from pathlib import Path

import filelock
import pytest
import torch
from train_tools import ALONE, ClipsUntil, RandomClips, StoppedError, small_run

from salt_distill.common.config import OptimConfig, TeacherRun, TrainConfig, VJepaRun
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.checkpoint import find_checkpoint, load_training, load_vit, read_tensors
from salt_distill.student_trainer import resume, run_directory
from salt_distill.student_trainer.event_files import TAGS
from salt_distill.student_trainer.loop import train_on
from salt_distill.student_trainer.run_directory import check_run, claimed, read_metrics
from salt_distill.student_trainer.schedule import ema_momentum, learning_rate, weight_decay

NANO = {"batch_size": 6, "view": {"num_frames": 2, "frame_step": 1, "crop_size": 16}, "log_every": 1}
NANO["optim"] = {"warmup_steps": 1, "clip_grad": 1e9}


def run_of(out: Path, **values) -> TrainConfig:
    return small_run(TeacherRun, **NANO | {"out": str(out), "steps": 3} | values)


def train(config: TrainConfig, clips: RandomClips | None = None) -> None:
    check_run(config)
    with claimed(config) as checkpoint:
        train_on(clips or RandomClips(config.view.clip_shape), (), config, ALONE, checkpoint)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A run of three steps; read only."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("done") / "run"
    train(run_of(out))
    return out


# --- a checkpoint's bytes ---

READERS = {
    "config.json": lambda checkpoint: load_vit(checkpoint),
    "model.safetensors": lambda checkpoint: load_vit(checkpoint),
    "predictor.safetensors": lambda checkpoint: read_tensors(
        checkpoint, "predictor.safetensors", torch.nn.Module()
    ),
    "training.pt": lambda checkpoint: load_training(checkpoint),
}


@pytest.mark.parametrize("file", READERS)
def test_no_damaged_file_of_a_checkpoint_is_read(done, tmp_path, file):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in find_checkpoint(done).iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    content = bytearray((checkpoint / file).read_bytes())
    content[-20] ^= 1
    (checkpoint / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: got sha256 .*, expected .*: it is damaged, use another"):
        READERS[file](checkpoint)
    (checkpoint / file).write_bytes(content[:-20])
    with pytest.raises(ValueError, match=rf"{file}: got \d+ bytes, expected \d+: it is damaged"):
        READERS[file](checkpoint)
    (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=rf"{file}: got a checkpoint without it"):
        READERS[file](checkpoint)
    (checkpoint / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: got a damaged file"):
        READERS[file](checkpoint)


# --- other clips, other lengths ---


def test_a_run_goes_on_with_its_own_clips_alone(tmp_path):
    train(run_of(tmp_path / "run"))
    longer = run_of(tmp_path / "run", steps=4, resume=True, data="moved elsewhere")
    other = RandomClips(longer.view.clip_shape)
    other.index_hash = "other videos"
    with pytest.raises(ValueError, match="index_hash=random, moved elsewhere has index_hash=other videos"):
        train(longer, other)
    with pytest.raises(ValueError, match=r"loader\.shuffle_shards=8, got loader\.shuffle_shards=1"):
        check_run(run_of(tmp_path / "run", steps=4, resume=True, loader={"shuffle_shards": 1}))
    train(longer)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_fewer_steps_are_refused_and_more_are_said_with_what_jumps(tmp_path, capsys):
    out = tmp_path / "run"
    train(run_of(out))
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=rf"got --steps 2, but {out} has done 3"):
        train(run_of(out, steps=2, resume=True))
    assert (out / "config.yaml").read_bytes() == before
    capsys.readouterr()
    longer = run_of(out, steps=6, resume=True)
    train(longer)
    rate, decay = (of(longer.optim, step=4, steps=6) for of in (learning_rate, weight_decay))
    assert (
        f"{out}: the learning rate goes on at {rate:.5g}, not at 1e-06; weight decay goes on at {decay:.5g},"
        " not at 0.4: --steps 6 with optim.schedule=cosine, before --steps 3 with optim.schedule=cosine\n"
    ) in capsys.readouterr().out
    assert read_metrics(out)[3]["lr"] == rate
    train(longer)
    assert "goes on at" not in capsys.readouterr().out


def test_what_jumps_is_said_of_every_schedule(tmp_path):
    run = small_run(VJepaRun, **NANO | {"out": str(tmp_path), "steps": 10, "ema": {"start": 0.9, "end": 1.0}})
    longer = run.model_copy(update={"steps": 20})
    said = resume.schedule_change(run, longer, 5)
    momentum = [ema_momentum(run.ema, step=6, steps=steps) for steps in (20, 10)]
    assert said is not None
    assert "; the EMA's momentum goes on at {:.5g}, not at {:.5g}: --steps 20".format(*momentum) in said
    constant = run.model_copy(update={"optim": run.optim.model_copy(update={"schedule": "constant"})})
    said = resume.schedule_change(run, constant, 5)
    assert said is not None
    assert "weight decay goes on at 0.04, not at" in said
    assert "momentum" not in said


def test_a_constant_run_is_cooled_down_later():
    constant = OptimConfig(lr=1.0, start_lr=0.5, final_lr=0.1, warmup_steps=2, schedule="constant")
    cooled = constant.model_copy(update={"schedule": "wsd", "decay_fraction": 0.4})
    rates = [learning_rate(constant, step=step, steps=10) for step in (1, 2, 5, 10)]
    assert rates == [0.75, 1.0, 1.0, 1.0]
    rates = [learning_rate(cooled, step=step, steps=10) for step in (1, 2, 6, 8, 10)]
    assert rates == pytest.approx([0.75, 1.0, 1.0, 0.55, 0.1])
    assert {weight_decay(cooled, step=step, steps=10) for step in range(11)} == {0.04}


def test_the_table_of_what_may_change_on_resume_is_made_from_the_fields():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    assert resume.table() in page, "run python -m salt_distill.student_trainer.resume"


# --- what others wrote ---


def test_nothing_is_written_under_a_running_run(tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(run_of(out))
    monkeypatch.setattr(run_directory, "CLAIM_S", 0.2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with (
        filelock.FileLock(out / ".lock"),
        pytest.raises(ValueError, match=r"in which another process trains since 0\.2 s"),
    ):
        train(run_of(out, steps=5, resume=True))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_of(tmp_path / "run", steps=5, keep_every=2)
    with pytest.raises(StoppedError):
        train(config, ClipsUntil(config, 3))
    time.sleep(1.1)  # event files are read by the second in their names, and a real restart takes longer
    train(run_of(tmp_path / "run", steps=5, keep_every=2, resume=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == [1, 2, 3, 4, 5]


def test_only_the_newest_checkpoints_stay_where_that_is_asked_for(tmp_path):
    train(run_of(tmp_path / "run", steps=5, keep_every=1, keep_last=2))
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-4", "step-5"}
    train(run_of(tmp_path / "run", steps=6, keep_every=1, keep_last=2, resume=True))


# --- bad clips ---


class SomeBad(RandomClips):
    """Two clips of every 24 are bad."""

    def clips(self, slots):
        batch = super().clips(slots)
        bad = [slot % 24 in (3, 5) for slot in slots]
        batch.good[bad] = False
        batch.pixels[bad] = 0
        return batch


@pytest.mark.parametrize("log_every", [1, 10])
def test_bad_clips_stop_a_run_by_the_readers_rule_alone(tmp_path, log_every):
    config = run_of(tmp_path / "run", batch_size=24, log_every=log_every, steps=3, keep_every=2)
    clips = SomeBad(config.view.clip_shape)
    train(config, clips)
    assert read_metrics(tmp_path / "run")[-1]["bad_clips"] == 3 * 2 + 1  # and the one that is always bad
    assert load_training(tmp_path / "run" / "checkpoints" / "step-2")["bad_clips"] == 2 * 2 + 1


def test_bad_clips_are_counted_on_over_a_resume(tmp_path):
    class Counted(SomeBad):
        def count_on(self, *, num_clips, num_bad):
            self.earlier = (num_clips, num_bad)

    train(run_of(tmp_path / "run", batch_size=24), Counted((2, 16, 16, 3)))
    longer = run_of(tmp_path / "run", batch_size=24, steps=4, resume=True)
    clips = Counted(longer.view.clip_shape)
    train(longer, clips)
    assert clips.earlier == (3 * 24, 7)
    assert [line["bad_clips"] for line in read_metrics(tmp_path / "run")] == [3, 5, 7, 9]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


# --- what TensorBoard shows ---


@pytest.mark.parametrize("kind", [TeacherRun, VJepaRun])
def test_tensorboard_has_groups_hyperparameters_and_pictures(tmp_path, kind):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_run(kind, **NANO | {"out": str(tmp_path / "run"), "steps": 3, "pictures_every": 2})
    train(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    line = read_metrics(tmp_path / "run")[-1]
    assert set(events.Tags()["scalars"]) == {f"{TAGS[name]}" for name in line if name != "step"}
    assert events.Scalars("optim/lr")[-1].value == pytest.approx(line["lr"])
    assert events.Tags()["images"] == ["pictures/mask_set_1", "pictures/mask_set_2"]
    [image] = events.Images("pictures/mask_set_1")
    assert image.step == 2
    num_strips = 3 if kind is TeacherRun else 2
    assert (image.width, image.height) == (128, 128 * num_strips + 6 * (num_strips - 1))
    [hyperparameters] = [
        plugin for plugin in events.summary_metadata.values() if plugin.plugin_data.plugin_name == "hparams"
    ][:1]
    assert b"optim.lr" in hyperparameters.plugin_data.content


def test_every_number_of_a_line_has_a_group():
    assert MetricsLine.model_fields.keys() - {"step"} == TAGS.keys()


def test_pictures_change_no_number(tmp_path):
    lines = []
    for every in (None, 1):
        out = tmp_path / str(every)
        train(run_of(out, pictures_every=every))
        lines.append([{name: line[name] for name in ("loss", "grad_norm")} for line in read_metrics(out)])
    assert lines[0] == lines[1]
