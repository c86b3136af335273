"""`salt-eval pictures`: components become colours, predictions are compared token by token, and every panel
is where it should be."""

import io

import av
import numpy as np
import pytest
import torch
from eval_tools import CONFIG, make_dataset, probe_results
from PIL import Image
from train_tools import small_run, train

from salt_distill.common.config import PicturesConfig, StudentRun, TeacherRun
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.pictures import GAP
from salt_distill.student_trainer.evaluation import gallery
from salt_distill.student_trainer.evaluation.feature_pictures import (
    agreement,
    paint,
    paint_agreement,
    pca_colours,
)
from salt_distill.student_trainer.evaluation.finished_runs import find_runs
from salt_distill.student_trainer.evaluation.reconstruction import masks_of
from salt_distill.student_trainer.evaluation.report.build import ReportInput, build
from salt_distill.student_trainer.evaluation.report.figures import CostPoint, pareto
from salt_distill.student_trainer.evaluation.report.lineage import teachers_among, training_flops
from salt_distill.student_trainer.evaluation.report.render import html_of

NO_DECODERS = {"decode_processes": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A teacher and its student, of two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    brief = {"data": str(data), "steps": 2, "optim": {"warmup_steps": 1}, "loader": NO_DECODERS}
    for config in (
        small_run(TeacherRun, **brief, out=str(folder / "teacher")),
        small_run(StudentRun, **brief, out=str(folder / "student"), teacher_ckpt=str(folder / "teacher")),
        small_run(TeacherRun, **brief, out=str(folder / "other"), seed=1),
    ):
        train(config)
    return folder


def test_components_are_those_of_a_singular_value_decomposition():
    tokens = torch.randn(2, 16, 8) * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.1, 0.1, 0.1, 0.1])
    flat = (tokens - tokens.mean((0, 1))).reshape(32, 8).double()
    _, _, directions = torch.linalg.svd(flat)
    colours = pca_colours(tokens).reshape(32, 3)
    for number in range(3):
        component = flat @ directions[number]
        kept = (colours[:, number] > 0) & (colours[:, number] < 1)  # without the tails that are cut off
        assert kept.sum() >= 28
        correlation = torch.corrcoef(torch.stack((component[kept], colours[kept, number].double())))[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(pca_colours(tokens.flip(1)).flip(1).reshape(32, 3), colours, atol=1e-5), (
        "signs do not hang on the order"
    )
    assert (colours.amin(0) == 0).all()
    assert (colours.amax(0) == 1).all()


def test_colours_lie_over_their_own_cubes():
    grid, colours = TokenGrid(2, 2, 3), torch.rand(12, 3)
    painted = paint(colours, grid, (4, 16, 24))
    for token in range(12):
        t, h, w = np.unravel_index(token, grid)
        cube = painted[2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
        assert (cube == (255 * colours[token].numpy()).round().astype(np.uint8)).all()


def test_agreement_is_one_for_an_oracle_and_shown_only_where_the_mask_hides():
    clip = np.random.default_rng(0).integers(0, 256, CONFIG.view.clip_shape, dtype=np.uint8)
    mask = masks_of(CONFIG, seed=0, step=1, batch_size=3).sets[1]
    target = torch.randn(1, CONFIG.grid.num_tokens, 5)
    target[0, mask.hidden_idx[2][0]] *= -1

    def oracle(visible, visible_idx, hidden_idx, *, grid, mask_set):
        assert mask_set == 1
        predicted = 3 * target[:, hidden_idx[0]]
        predicted[0, 0] *= -1
        return predicted

    cosine = agreement(
        torch.zeros(1),
        target,
        mask,
        2,
        1,
        encoder=lambda clip, idx: torch.zeros(1),
        predictor=oracle,
        grid=CONFIG.grid,
    )
    hidden = mask.hidden_idx[2]
    assert sorted(torch.nonzero(~cosine.isnan())[:, 0].tolist()) == hidden.tolist()
    assert cosine[hidden[0]] == pytest.approx(-1)
    assert torch.allclose(cosine[hidden[1:]], torch.ones(len(hidden) - 1))
    shown = paint_agreement(cosine, clip, CONFIG.grid)
    t, h, w = np.unravel_index(int(hidden[1]), CONFIG.grid)
    assert tuple(shown[2 * t, 8 * h, 8 * w]) == (253, 231, 37), "viridis at its top"
    visible = int(mask.visible_idx[2][0])
    t, h, w = np.unravel_index(visible, CONFIG.grid)
    assert (shown[2 * t, 8 * h, 8 * w] == round(clip[2 * t, 8 * h, 8 * w].mean())).all()


def test_the_command_writes_a_sheet_and_a_video_of_every_clip(data, runs, tmp_path):
    ckpts = (str(runs / "teacher"), str(runs / "student"))
    gallery.run(
        PicturesConfig(
            ckpt=ckpts,
            teacher=ckpts[0],
            data=str(data),
            out=str(tmp_path / "out"),
            num_clips=2,
            loader=NO_DECODERS,
        )
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"clip-00{n}.{kind}" for n in (0, 1) for kind in ("mp4", "png")
    ]
    # The clip, two encoders' components, two runs' two masks, what the teacher paints and the student
    # predicts under two: eleven strips.
    image = Image.open(io.BytesIO((tmp_path / "out" / "clip-000.png").read_bytes()))
    assert image.width == 2 * 128 + GAP
    assert image.height > 11 * (128 + gallery.LINE_HEIGHT)
    with av.open(str(tmp_path / "out" / "clip-000.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4, "as many as the clip's"
    assert frames[0].shape[1] == 4 * (224 + GAP)


def test_another_teacher_is_refused(data, runs, tmp_path):
    wrong = PicturesConfig(
        ckpt=(str(runs / "student"),),
        teacher=str(runs / "other"),
        data=str(data),
        out=str(tmp_path),
        num_clips=1,
        loader=NO_DECODERS,
    )
    with pytest.raises(ValueError, match=r"other with fingerprint \w+, expected \w+, which it learned from"):
        gallery.run(wrong)


def test_a_run_finds_its_teacher_and_counts_its_training(runs):
    found, _ = find_runs((), runs)
    teachers = teachers_among(found)
    by_name = {run.name: run for run in found}
    assert {name: [teacher.name for teacher in several if teacher] for name, several in teachers.items()} == {
        "teacher": [],
        "other": [],
        "student": ["teacher"],
    }
    flops = {name: run.results.flops for name, run in by_name.items()}
    assert training_flops(by_name["student"], teachers) == flops["student"] + flops["teacher"]
    assert training_flops(by_name["student"], teachers | {"student": [None]}) is None, (
        "half of a cost is none"
    )


def test_the_report_compares_accuracy_with_compute_and_shows_latents(runs):
    accuracy = {"random-init": 0.7, "teacher": 0.6, "other": 0.5, "student": 0.9}
    found, _ = find_runs((), runs)
    probe = probe_results(
        {name: {"shade": value} for name, value in accuracy.items()},
        {run.name: run.fingerprint for run in found} | {"random-init": "0" * 64},
    )
    page, _ = build(ReportInput(runs=found, unfinished=[], probe=probe, seconds={}))
    html = html_of(page)
    assert "Accuracy against compute" in html
    compute = html[html.index("Accuracy against compute") :].split("</section>")[0]
    assert "Without" not in compute
    assert ">random weights<" in compute, "a teacher below them is on no front"
    latents = html[html.index("<h2>Latents") :].split("</section>")[0]
    assert latents.count("<img") == 1 + 3 + 2, "the clip, three encoders, a student under two mask sets"
    students = [run for run in found if run.name != "teacher"]
    page, _ = build(ReportInput(runs=students, unfinished=[], probe=probe, seconds={}))
    html = html_of(page)
    assert "Accuracy against compute" not in html, "one run with a known cost compares with nothing"


def test_the_front_is_what_nobody_beats():
    made = [("a", 1, 0.5), ("b", 2, 0.4), ("c", 3, 0.8), ("d", 3, 0.7), ("e", 4, 0.8), ("f", 5, 0.9)]
    points = [
        CostPoint(name=name, colour=0, flops=flops, value=value, interval=(0, 1))
        for name, flops, value in made
    ]
    assert [point.name for point in pareto(points[::-1])] == ["a", "c", "f"]
