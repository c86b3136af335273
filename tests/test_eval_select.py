"""Held-out losses against a loop, the line through probed checkpoints, what may not be compared, and the
command."""

import json

import numpy as np
import pytest
import torch
from eval_tools import CONFIG, ENCODER, MASK, make_dataset, make_run, probe_results, save
from PIL import Image
from scipy.stats import linregress

from salt_distill.common.config import FrozenConfig, LoaderConfig, SelectConfig, TeacherComputeConfig
from salt_distill.common.model.checkpoint import (
    CheckpointConfig,
    load_predictor,
    load_vit,
    new_predictor,
    open_encoder,
    point_to,
)
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.teacher import Teacher
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.student_trainer.evaluation.finished_runs import find_runs
from salt_distill.student_trainer.evaluation.held_out import (
    checkpoints,
    student_loss,
    targets_of,
    vpixel_loss,
)
from salt_distill.student_trainer.evaluation.probe.features import first_clips
from salt_distill.student_trainer.evaluation.select import run
from salt_distill.student_trainer.evaluation.selection import fit

LOADER = LoaderConfig(decode_processes=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, two teachers, and students of the first with two checkpoints each; the last has another
    teacher."""
    folder = tmp_path_factory.mktemp("select")
    data = make_dataset(folder / "toy", num_clips=90)
    teachers = [make_run(folder / f"teacher-{seed}", data, seed=seed) for seed in (10, 11)]
    prints = [frozen(path).spec.fingerprint for path in teachers]
    students = [student(folder / name, data, prints[name == "c"], seed) for seed, name in enumerate("abc")]
    return data, teachers, students


def frozen(path) -> Teacher:
    return Teacher(
        open_encoder(FrozenConfig(ckpt=str(path))), TeacherComputeConfig(batch_size=8), torch.device("cpu")
    )


def student(path, data, fingerprint, seed, **changes):
    make_run(path, data, source="in-process", seed=seed)
    values = {
        "objective": "salt",
        "predictor_out_width": ENCODER.width,
        "teacher_fingerprint": fingerprint,
    } | changes
    config = CheckpointConfig.model_validate(CONFIG.model_dump() | values)
    for step in (3, 12):
        encoder, predictor = Encoder(ENCODER), new_predictor(config)
        generator = torch.Generator().manual_seed(100 * seed + step)
        init_weights(encoder, generator, std=0.1)
        predictor.init_weights(generator, std=0.1 * step)
        save(path / "checkpoints" / f"step-{step}", config, encoder, predictor)
    point_to(path, path / "checkpoints" / "step-12")
    return path


def test_a_held_out_loss_is_the_training_loss(made):
    """Written out, a clip at a time: 30 clips are a whole mask group and a part of one."""
    data, (teacher, _), (path, *_) = made
    _, clips = first_clips(str(data), "test", CONFIG.view, LOADER, 100)
    assert len(clips) == 30
    ckpt, device = path / "checkpoints" / "step-3", torch.device("cpu")
    values = {"teacher": frozen(teacher).spec.fingerprint, "targets": targets_of(frozen(teacher), clips, 8)}
    found = student_loss(ckpt, clips, seed=5, device=device, **values)
    encoder, predictor, losses = load_vit(ckpt), load_predictor(ckpt), []
    for group in range(2):
        masks = mask_group(MASK, CONFIG.grid, seed=5, step=0, group=group, batch_size=30)
        for set_idx, mask in enumerate(masks.sets):
            for row in range(masks.size):
                clip = clips[masks.first + row][None]
                target = frozen(teacher).forward(clip)[0, mask.hidden_idx[row]]
                with torch.no_grad():
                    seen = encoder(normalise(torch.from_numpy(clip)), mask.visible_idx[row : row + 1])
                    expected = predictor(
                        seen,
                        mask.visible_idx[[row]],
                        mask.hidden_idx[[row]],
                        grid=CONFIG.grid,
                        mask_set=set_idx,
                    )
                losses.append((expected[0] - target).abs().mean().item())
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    other_masks = student_loss(ckpt, clips, seed=6, device=device, **values)
    assert found != other_masks
    assert (
        0.5
        < vpixel_loss(teacher / "checkpoints" / "step-3", clips, pixel_norm="channel", seed=5, device=device)
        < 2
    )


def test_checkpoints_are_in_order(made):
    (one,), _ = find_runs([str(made[2][0])], None)
    assert [path.name for path in checkpoints(one.path)] == ["step-3", "step-12"]


def test_the_line_is_least_squares():
    rng = np.random.default_rng(0)
    x = rng.normal(size=9)
    y = 0.4 - 0.2 * x + 0.05 * rng.normal(size=9)
    line, oracle = fit(x.tolist(), y.tolist()), linregress(x, y)
    assert line is not None
    assert (line.slope, line.intercept, line.r2) == pytest.approx(
        (oracle.slope, oracle.intercept, oracle.rvalue**2)
    )
    exact = fit([1, 2, 4], [2, 4, 8])
    assert exact is not None
    assert exact.predict(3) == pytest.approx((6, 6, 6))
    assert exact.r2 == pytest.approx(1)
    assert fit([1, 2], [1, 2]) is None
    assert fit([1, 1, 1], [1, 2, 3]) is None


def test_a_line_needs_three_places():
    """Two of three points are one point: through the rest goes every line with R² 1."""
    assert fit([0.3, 0.3, 0.4], [0.5, 0.5, 0.6]) is None
    assert fit([0.3, 0.3 + 1e-8, 0.4], [0.5, 0.5, 0.6]) is None  # the same weights, scored twice
    assert fit([], []) is None
    assert fit([0.3, 0.35, 0.4], [0.5, 0.5, 0.6]) is not None


def test_the_interval_holds_95_of_100_new_points():
    rng = np.random.default_rng(1)
    x, inside = np.array([0.0, 1, 2, 3, 5]), []
    for _ in range(2000):
        line = fit(x.tolist(), (1 - 0.3 * x + rng.normal(size=5)).tolist())
        assert line is not None
        _, low, high = line.predict(7.0)
        inside.append(low < 1 - 0.3 * 7 + rng.normal() < high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def select(tmp_path, made, students, teachers, **values):
    data, _, _ = made
    config = {
        "run_dirs": tuple(map(str, students)),
        "teacher": tuple(map(str, teachers)),
        "data": str(data),
        "loader": LOADER,
    }
    run(SelectConfig(**config, out=str(tmp_path / "select.json"), **values))
    return json.loads((tmp_path / "select.json").read_text())


def test_losses_alone_without_a_probe(tmp_path, made, capsys):
    _, teachers, (a, b, _) = made
    found = select(tmp_path, made, [a, b], teachers[:1])
    assert [row["name"] for row in found["checkpoints"]] == ["a/step-3", "a", "b/step-3", "b"]
    assert len({row["x"] for row in found["checkpoints"]}) == 4
    assert found["r2"] is None
    assert "needs 3 probed checkpoints" in capsys.readouterr().out


def test_accuracy_is_predicted_for_what_was_not_probed(tmp_path, made):
    _, teachers, (a, b, _) = made
    losses = {row["name"]: row["x"] for row in select(tmp_path, made, [a, b], teachers[:1])["checkpoints"]}
    accuracy = {
        name: {"shade": 0.9 - losses[name] / 10, "side": 0.5} for name in ("a/step-3", "a", "b/step-3")
    }
    rows = select(tmp_path, made, [a, b], teachers[:1])["checkpoints"]
    fingerprints = {row["name"]: row["fingerprint"] for row in rows}
    probe_results(accuracy, fingerprints).write(tmp_path / "probe.json")
    found = select(tmp_path, made, [a, b], teachers[:1], probe=str(tmp_path / "probe.json"), label="shade")
    assert (found["r2"], found["slope"], found["num_probed"]) == (pytest.approx(1), pytest.approx(-0.1), 3)
    assert found["label"] == "shade"
    last = found["checkpoints"][-1]
    assert (last["name"], last["accuracy"]) == ("b", None)
    assert last["predicted"]["accuracy"] == pytest.approx(0.9 - losses["b"] / 10)
    with Image.open(tmp_path / "select.png") as picture:
        assert min(picture.size) > 300
    probe_results(accuracy, fingerprints | {"a": "ef" * 32}).write(tmp_path / "probe.json")
    found = select(tmp_path, made, [a, b], teachers[:1], probe=str(tmp_path / "probe.json"), label="shade")
    (other,) = [row for row in found["checkpoints"] if row["name"] == "a"]
    assert (other["accuracy"], found["r2"]) == (None, None)
    assert other["not_measured"].startswith("the probe's a has other weights (efefefefefef, these are")
    with pytest.raises(ValueError, match="got no --label, expected one of shade, side"):
        select(tmp_path, made, [a, b], teachers[:1], probe=str(tmp_path / "probe.json"))


def test_what_may_not_be_compared_is_refused(tmp_path, made):
    data, teachers, (a, b, c) = made
    with pytest.raises(
        ValueError,
        match=r"got runs of 2 teachers, expected one: losses against different targets say nothing",
    ):
        select(tmp_path, made, [a, c], teachers)
    with pytest.raises(ValueError, match=r"whose teacher is .*, expected one of those given as --teacher"):
        select(tmp_path, made, [a, c], teachers[:1])
    with pytest.raises(ValueError, match="a run of vpixel, expected students of a frozen teacher"):
        select(tmp_path, made, [a, teachers[0]], teachers[:1])
    other = {"mask": {"sets": [{"hidden_fraction": 0.5}, {"hidden_fraction": 0.7}]}}
    tubes = student(tmp_path / "tubes", data, frozen(teachers[0]).spec.fingerprint, 9, **other)
    with pytest.raises(ValueError, match="got tubes with other clips or masks than b, expected the same"):
        select(tmp_path, made, [b, tubes], teachers[:1])


def test_the_teachers_own_numbers_compare_students_of_several(tmp_path, made):
    _, teachers, (a, b, c) = made
    by_loss = select(tmp_path, made, [a, b, c], teachers, by="teacher-loss")["checkpoints"]
    assert [row["name"] for row in by_loss] == ["a", "b", "c"]
    assert by_loss[0]["x"] == by_loss[1]["x"] != by_loss[2]["x"]
    by_rank = select(tmp_path, made, [a, c], teachers, by="rankme")["checkpoints"]
    assert all(1 < row["x"] < 24 for row in by_rank)
    of_students = select(tmp_path, made, [a, b], teachers[:1], by="student-rankme")["checkpoints"]
    assert [row["name"] for row in of_students] == ["a/step-3", "a", "b/step-3", "b"]
    assert len({row["x"] for row in of_students}) == 4
    assert all(1 < row["x"] < 24 for row in of_students)
    with pytest.raises(ValueError, match="got runs of 2 teachers, expected one"):
        select(tmp_path, made, [a, c], teachers, by="student-rankme")
    with pytest.raises(ValueError, match="got 10 clips for RankMe of 24 channels"):
        select(tmp_path, made, [a], teachers[:1], by="rankme", max_clips=10)
