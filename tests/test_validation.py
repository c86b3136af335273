"""The loss on held-out clips while a run trains: what it is, that training does not notice, where it leads.
Dry runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_tools import make_dataset
from rich.console import Console
from train_tools import CPU, StoppedError, small_run, train

from salt_distill.common.config import PrecomputeConfig, StudentRun, TeacherRun, TrainConfig, VJepaRun
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import find_checkpoint, load_training, read_config
from salt_distill.student_trainer import loop
from salt_distill.student_trainer.evaluation.held_out import vpixel_loss
from salt_distill.student_trainer.resume import ClipOrder, Position
from salt_distill.student_trainer.run_directory import check_run, read_metrics
from salt_distill.student_trainer.start import start
from salt_distill.student_trainer.targets.stored_targets import TargetMissError
from salt_distill.student_trainer.validation import Best, halves_accuracy
from salt_distill.teacher_server.precompute import precompute

LOADER = {"decode_processes": 0, "frame_cache_bytes": 10_000_000}
VALUES = {"log_every": 1, "views": 2, "workers": 0, "loader": LOADER}
VAL = {"val_every": 2, "val_clips": 25}  # a mask group and a clip of another


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """60 clips to train on, 30 of `val`."""
    return str(make_dataset(tmp_path_factory.mktemp("data") / "toy", num_clips=90, splits=("train", "val")))


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory) -> str:
    """30 clips of `train` alone."""
    return str(make_dataset(tmp_path_factory.mktemp("data") / "toy", splits=("train", "train")))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A run of stage 1 with a held-out loss."""
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    return run_in(out, data, TeacherRun, keep_every=5, **VAL)


def run_in(out, data, kind: type[TrainConfig] = VJepaRun, **values):
    """A finished run."""
    config = small_run(kind, **VALUES | values, data=data, out=str(out))
    check_run(config)
    train(config)
    return out


def reader_of(data, **values) -> Reader:
    config = small_run(**VALUES)
    rest = {"view": config.view, "loader": config.loader}
    return Reader(data, **{"data_seed": 0, "views": 1, "split": "train"} | rest | values)


def column(run, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run) if name in line}


def model_of(run) -> bytes:
    return (find_checkpoint(run) / "model.safetensors").read_bytes()


def test_training_does_not_notice_that_it_is_judged(data, tmp_path):
    torch.set_num_threads(1)
    judged = run_in(tmp_path / "judged", data, steps=6, **VAL)
    alone = run_in(tmp_path / "alone", data, steps=6)
    for name in ("loss", "grad_norm", "slot", "flops"):
        assert column(judged, name) == column(alone, name)
    assert model_of(judged) == model_of(alone)
    assert list(column(judged, "val_loss")) == list(column(judged, "val_ms")) == [2, 4, 6]
    assert column(alone, "val_loss") == {}


def test_it_is_the_loss_of_the_checkpoint_on_clips_of_val(teacher, data):
    """Those with the least hash of their keys, in their first view; as `salt-eval select` computes it."""
    losses = column(teacher, "val_loss")
    best = teacher / "checkpoints" / "best"
    step = read_config(best).step
    assert losses[step] == min(losses.values())
    reader = reader_of(data, num_held_out=25)
    held_out = reader.held_out
    assert held_out is not None
    samples = reader.dataset.take(held_out.rows)
    assert {sample.split for sample in samples} == {"val"}
    assert len({sample.key for sample in samples}) == 25
    clips = reader.view(samples, 0)
    expected = vpixel_loss(best, clips.pixels, pixel_norm="channel", seed=0, device=CPU)
    assert losses[step] == pytest.approx(expected, rel=1e-6)


def test_the_least_loss_has_a_checkpoint_and_no_other_stays_for_it(teacher):
    folder = teacher / "checkpoints"
    steps = {5, 10, read_config(folder / "best").step}
    assert {path.name for path in folder.iterdir()} == {"best"} | {f"step-{step}" for step in steps}
    summary = json.loads((teacher / "summary.json").read_text())
    assert summary["val_loss_best"] == min(column(teacher, "val_loss").values())
    assert summary["val_step_best"] == read_config(folder / "best").step


def test_a_run_that_was_killed_goes_on_with_what_it_had_found(teacher, data, tmp_path, monkeypatch):
    backward, done = loop.backward, []

    def killed_after_seven(*arguments):
        if len(done) == 7:
            raise StoppedError
        done.append(1)
        return backward(*arguments)

    monkeypatch.setattr(loop, "backward", killed_after_seven)
    with pytest.raises(StoppedError):
        run_in(tmp_path / "run", data, TeacherRun, keep_every=5, **VAL)
    monkeypatch.undo()
    run_in(tmp_path / "run", data, TeacherRun, keep_every=5, resume=True, **VAL)
    for name in ("loss", "val_loss"):
        assert column(tmp_path / "run", name) == column(teacher, name)
    found = [load_training(find_checkpoint(run))["best"] for run in (tmp_path / "run", teacher)]
    assert found[0] == found[1]
    assert read_config(tmp_path / "run" / "checkpoints" / "best").step == found[0][0]


def test_without_gain_a_run_ends_and_is_ended_when_it_is_continued(data, tmp_path, capsys):
    still = {"lr": 1e-12, "start_lr": 1e-12, "final_lr": 1e-12, "warmup_steps": 0}
    values = {"stop_after_no_gain": 2, "optim": still, **VAL}
    out = run_in(tmp_path / "run", data, TeacherRun, **values)
    assert list(column(out, "val_loss")) == [2, 4, 6]  # the first is the best
    assert "ends at step 6" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["steps"] == 6
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"best", "step-2", "step-6"}
    run_in(out, data, TeacherRun, resume=True, **values)
    assert list(column(out, "loss")) == [1, 2, 3, 4, 5, 6]
    run_in(out, data, TeacherRun, resume=True, **values | {"stop_after_no_gain": 3})
    assert list(column(out, "val_loss")) == [2, 4, 6, 8]


def test_newest_checkpoints_leave_the_best(data, tmp_path):
    still = {"lr": 1e-12, "start_lr": 1e-12, "final_lr": 1e-12, "warmup_steps": 0}
    run_in(tmp_path / "run", data, TeacherRun, optim=still, keep_every=3, keep_last=1, steps=6, **VAL)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"best", "step-2", "step-6"}


def test_without_a_split_of_its_own_training_clips_are_held_out(unsplit, tmp_path, capsys):
    config = small_run(**VALUES, data=unsplit, out=str(tmp_path / "run"), **VAL | {"val_clips": 10})
    train(config)
    assert "10 clips of split 'train', left out of training, which has 20 samples" in capsys.readouterr().out
    readers = [reader_of(unsplit, num_held_out=10, data_seed=seed) for seed in (0, 1)]
    first, second = (reader.held_out for reader in readers)
    assert first is not None
    assert second is not None
    assert first.rows.tolist() == second.rows.tolist()  # whatever the seed
    trained = {key for key in readers[0].clips(range(20)).keys}
    assert len(trained) == 20
    assert not trained & set(readers[0].dataset.keys(first.rows))
    with pytest.raises(ValueError, match="expected at most 15: lower --val-clips"):
        run_in(tmp_path / "half", unsplit, val_every=2, val_clips=16)
    values = VALUES | {"data": unsplit, "out": str(tmp_path / "run"), "steps": 12, "resume": True}
    with pytest.raises(ValueError, match="split=train without 10 held-out clips"):
        train(small_run(**values))


def test_switching_it_on_later_does_not_judge_by_clips_that_were_learned_from(unsplit, data, tmp_path):
    run_in(tmp_path / "run", data, steps=4)
    run_in(tmp_path / "run", data, resume=True, steps=6, val_every=3)
    assert list(column(tmp_path / "run", "val_loss")) == [6]
    run_in(tmp_path / "other", data, steps=4)
    run_in(tmp_path / "other", data, resume=True, steps=6, val_every=3, val_clips=5)
    run_in(tmp_path / "other", data, resume=True, steps=8)  # and off again
    assert list(column(tmp_path / "other", "val_loss")) == [6]
    config = small_run(**VALUES)
    before, now = (ClipOrder.of(config, reader_of(unsplit, num_held_out=number)) for number in (0, 10))
    position = Position(step=1, slot=30, rng=torch.get_rng_state(), teacher=None, clips=before.to_json())
    with pytest.raises(ValueError, match="split=train, toy has split=train without 10 held-out clips: give"):
        position.require_clips(now, "toy")


def test_held_out_targets_come_from_where_the_others_do(teacher, data, tmp_path):
    """Of a teacher in this process, and of a cache that has them or not."""
    short = {"steps": 4, "optim": {"warmup_steps": 1}, **VAL}
    local = run_in(tmp_path / "local", data, StudentRun, teacher_ckpt=str(teacher), **short)
    for split in ("train", "all"):
        made = {"ckpt": str(teacher), "data": data, "out": str(tmp_path / split), "views": 2, "split": split}
        precompute(
            PrecomputeConfig.model_validate(made | {"workers": 0, "loader": LOADER}), Console(quiet=True)
        )
    with pytest.raises(TargetMissError, match=r"lacks held-out clips of split 'val'.*precompute them too"):
        run_in(tmp_path / "refused", data, StudentRun, targets=str(tmp_path / "train"), **short)
    cached = run_in(tmp_path / "cached", data, StudentRun, targets=str(tmp_path / "all"), **short)
    assert column(cached, "val_loss") == column(local, "val_loss")
    assert column(cached, "loss") == column(local, "loss")


def test_features_are_judged_where_that_is_asked_for(data, tmp_path, capsys):
    narrow = {"width": 24, "depth": 1, "num_heads": 2, "mlp_width": 32, "patch_size": 8}
    out = run_in(tmp_path / "run", data, val_features=True, encoder=narrow, steps=4, **VAL)
    assert "RankMe, k-NN of shade every 2 steps" in capsys.readouterr().out
    assert all(1 < value <= 24 for value in column(out, "val_rankme").values())
    assert all(0 <= value <= 1 for value in column(out, "val_knn").values())
    with pytest.raises(ValueError, match="--val-clips 25, expected 32 or more: RankMe needs"):
        run_in(tmp_path / "wide", data, steps=4, val_features=True, **VAL)
    more = VAL | {"val_clips": 32}  # than `val` has
    with pytest.raises(ValueError, match=r"\d+ held-out clips for 32 channels, expected at least as many"):
        run_in(tmp_path / "wide", data, steps=4, val_features=True, **more)
    classes = torch.arange(20) % 2
    features = torch.stack([classes, 1 - classes], 1) + 0.01 * torch.rand(20, 2)
    assert halves_accuracy(features, classes) == 0  # the halves have a class each
    order = torch.from_numpy(np.random.default_rng(0).permutation(20))
    assert halves_accuracy(features[order], classes[order]) == 1


def test_a_gain_is_less_than_the_least():
    best = Best()
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, float("nan")], 1):
        best = best.after(step, loss)
    assert best == (2, 2.0, 3)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"val_every": 15, "log_every": 10}, "--val-every 15 with --log-every 10, expected a multiple"),
        ({"stop_after_no_gain": 2}, "--stop-after-no-gain without --val-every"),
        ({"dry_run": True, "resume": True}, "--dry-run with --resume, expected one of them"),
        ({"dry_run": True, "estimate": True}, "--estimate with --dry-run, expected one of them"),
    ],
)
def test_what_means_nothing_together_is_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_run(**values)


# --- dry runs ---


def files_in(folder) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_dry_run_says_what_it_found_and_writes_nothing(teacher, data, tmp_path, capsys):
    values = VALUES | VAL | {"data": data, "teacher_ckpt": str(teacher), "dry_run": True}
    config = small_run(StudentRun, **values, out=str(tmp_path / "runs" / "student"))
    before = files_in(teacher), files_in(Path(data)), sorted(tmp_path.parent.iterdir())
    start(config)
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in (
        "salt, 10 steps of 30 clips",
        "60 samples of split 'train', seen 5.0 times",
        "float32",
        "from in process",
        "0 clips could not be decoded",
        "at the peak",
        "free, nothing was",
    ):
        assert words in said, said
    assert (files_in(teacher), files_in(Path(data)), sorted(tmp_path.parent.iterdir())) == before
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_beside_a_finished_run_leaves_it_alone(teacher, data, capsys):
    before = files_in(teacher)
    start(small_run(TeacherRun, **VALUES, data=data, out=str(teacher), dry_run=True))
    assert files_in(teacher) == before
    assert "holds a run already: add --resume" in re.sub(r"\s+", " ", capsys.readouterr().out)
