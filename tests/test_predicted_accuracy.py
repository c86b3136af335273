"""The accuracy that a held-out loss predicts while a run trains: from which runs, and when not."""

import re

import pytest
import torch
from eval_tools import make_dataset, probe_results
from scipy.stats import linregress
from train_tools import small_run, train

from salt_distill.common.config import FrozenConfig, StudentRun, TeacherRun, TrainConfig
from salt_distill.common.model.checkpoint import open_encoder, read_config
from salt_distill.common.model.teacher import fingerprint
from salt_distill.student_trainer.run_directory import check_run, read_metrics

LOADER = {"decode_processes": 0, "frame_cache_bytes": 10_000_000}
VALUES = {"log_every": 1, "views": 2, "workers": 0, "loader": LOADER, "optim": {"warmup_steps": 1}}
JUDGED = {"steps": 4, "val_every": 2, "val_clips": 12, "keep_every": 2}


def run_in(out, data, kind: type[TrainConfig] = StudentRun, **values):
    config = small_run(kind, **VALUES | values, data=data, out=str(out))
    check_run(config)
    train(config)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, and in `finished` two students with two checkpoints each and one of other held-out clips,
    beside the probe's accuracies of all."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    data = str(make_dataset(folder / "toy", num_clips=36, splits=("train", "val")))
    teacher = run_in(folder / "teacher", data, TeacherRun, steps=2)
    of_teacher = {"teacher_ckpt": str(teacher), **JUDGED}
    for name, more in (("a", {"seed": 1}), ("b", {"seed": 2}), ("other", {"val_clips": 6})):
        run_in(folder / "finished" / name, data, **of_teacher | more)
    checkpoints = sorted((folder / "finished").glob("*/checkpoints/step-*"))
    encoders = {str(path): open_encoder(FrozenConfig(ckpt=str(path))) for path in checkpoints}
    accuracy = {name: {"shade": 0.3 + 0.1 * number} for number, name in enumerate(encoders)}
    weights = {name: fingerprint(encoder, encoder.load()) for name, encoder in encoders.items()}
    probe_results(accuracy, weights).write(folder / "finished" / "probe.json")
    return folder, data, of_teacher


def points(folder) -> list[tuple[float, float]]:
    """Held-out loss and accuracy of the checkpoints of a and b."""
    found = []
    for number, path in enumerate(sorted((folder / "finished").glob("[ab]/checkpoints/step-*"))):
        losses = {line["step"]: line.get("val_loss") for line in read_metrics(path.parents[1])}
        found.append((losses[read_config(path).step], 0.3 + 0.1 * number))
    return found


def test_a_run_says_what_its_held_out_loss_predicts(runs, tmp_path, capsys):
    folder, data, of_teacher = runs
    out = run_in(tmp_path / "new", data, **of_teacher, seed=1, predict_from=str(folder / "finished"))
    said = capsys.readouterr().out
    oracle = linregress(*zip(*points(folder), strict=True))
    assert f"accuracy of shade is predicted by 4 probed checkpoints in {folder / 'finished'}" in said
    assert f"R\u00b2 {oracle.rvalue**2:.2f}" in said
    assert "Left out: other: another val_clips." in said
    predicted = [line for line in read_metrics(out) if "predicted_accuracy" in line]
    assert predicted
    for line in predicted:
        value = min(1, max(0, oracle.intercept + oracle.slope * line["val_loss"]))
        assert line["predicted_accuracy"] == pytest.approx(value)
        assert 0 <= line["predicted_low"] <= value <= line["predicted_high"] <= 1
    plain = run_in(tmp_path / "plain", data, **of_teacher, seed=1)
    for name in ("loss", "val_loss"):
        assert [line.get(name) for line in read_metrics(out)] == [
            line.get(name) for line in read_metrics(plain)
        ]


def test_too_few_checkpoints_predict_nothing_and_it_is_said(runs, tmp_path, capsys):
    folder, data, of_teacher = runs
    few = tmp_path / "few"
    few.mkdir()
    (few / "a").symlink_to(folder / "finished" / "a")
    (few / "probe.json").write_bytes((folder / "finished" / "probe.json").read_bytes())
    out = run_in(tmp_path / "new", data, **of_teacher, predict_from=str(few))
    assert all("predicted_accuracy" not in line for line in read_metrics(out))
    found = f"got 2 probed checkpoints with different held-out losses in {few}, expected 4 at least"
    assert f"no accuracy is predicted: {found}" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_predict_is_refused(runs, tmp_path):
    folder, data, of_teacher = runs
    there = {"predict_from": str(folder / "finished")}
    with pytest.raises(ValueError, match="got --predict-label side, expected one of shade, which"):
        run_in(tmp_path / "label", data, **of_teacher, **there, predict_label="side")
    with pytest.raises(ValueError, match=re.escape("expected the JSON file of `salt-eval probe`")):
        run_in(tmp_path / "none", data, **of_teacher, predict_from=str(folder))
    with pytest.raises(ValueError, match="got --predict-from without --val-every"):
        small_run(StudentRun, **VALUES, data=data, teacher_ckpt="x", **there)
