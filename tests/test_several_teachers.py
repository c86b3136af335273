"""Several teachers of one student: one loss each, of whose weighted mean the run learns; the same from every
source, and after a kill."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from rich.console import Console
from teacher_tools import runs_on_board, serving
from test_chain import SMALL
from train_tools import ALONE, CPU, ClipsUntil, StoppedError, train

from salt_distill.common.config import (
    FrozenConfig,
    PrecomputeConfig,
    StudentRun,
    TeacherComputeConfig,
    TeacherRun,
    merge,
)
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.checkpoint import load_predictor, open_encoder, read_config
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.evaluation import panels
from salt_distill.student_trainer.loop import train_on
from salt_distill.student_trainer.opening import opened
from salt_distill.student_trainer.run_directory import claimed, read_metrics
from salt_distill.teacher_server.precompute import precompute

NUM_STEPS = 4


def of(kind, shards, out, **values):
    return kind.model_validate(merge(SMALL, {"data": str(shards), "out": str(out)}, values))


@pytest.fixture(scope="module")
def teachers(shards, tmp_path_factory) -> tuple[Path, Path]:
    """Two teachers of other widths."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, width in (("narrow", 24), ("wide", 40)):
        train(of(TeacherRun, shards, folder / name, encoder={"width": width}, seed=width))
    return folder / "narrow", folder / "wide"


def student(shards, out, *ckpts, **values) -> list[MetricsLine]:
    ckpts = {"teacher_ckpt": [str(ckpt) for ckpt in ckpts]} if ckpts else {}
    train(of(StudentRun, shards, out, steps=NUM_STEPS, **ckpts, **values))
    return [MetricsLine.model_validate(line) for line in read_metrics(out)]


def losses(lines):
    return [(line.loss, line.loss_teacher0, line.loss_teacher1) for line in lines]


@pytest.fixture(scope="module")
def local(shards, teachers, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "run"
    return out, losses(student(shards, out, *teachers))


def test_each_teacher_has_its_loss_and_the_run_their_mean(local, shards, teachers, tmp_path):
    for loss, first, second in local[1]:
        assert loss == pytest.approx((first + second) / 2, rel=1e-6)
        assert first != pytest.approx(second, rel=1e-3)
    weighted = losses(student(shards, tmp_path / "run", *teachers, teacher_weight=[3, 1]))
    assert weighted[0][1:] == pytest.approx(local[1][0][1:], rel=1e-6)  # before the first step
    assert weighted[-1][1:] != pytest.approx(local[1][-1][1:], rel=1e-6)
    for loss, first, second in weighted:
        assert loss == pytest.approx((3 * first + second) / 4, rel=1e-6)


def test_served_cached_and_in_process_give_the_same_losses_in_any_mix(local, shards, teachers, tmp_path):
    frozen = [
        Teacher(open_encoder(FrozenConfig(ckpt=str(ckpt))), TeacherComputeConfig(), CPU) for ckpt in teachers
    ]
    with serving(frozen[0]) as (first, _), serving(frozen[1]) as (second, _):
        caches = [str(tmp_path / "kept-0"), str(tmp_path / "kept-1")]
        urls = {"teacher_url": [first, second], "cache": caches}
        assert losses(student(shards, tmp_path / "served", **urls)) == local[1]
        assert losses(student(shards, tmp_path / "again", **urls)) == local[1]
        summary = json.loads((tmp_path / "again" / "summary.json").read_text())
        assert [teacher["fingerprint"] for teacher in summary["teacher"]] == [
            teacher.spec.fingerprint for teacher in frozen
        ]
        for number, url in enumerate((first, second)):  # each board shows the loss of its own teacher
            shown = {run["id"]: run["progress"]["loss"] for run in runs_on_board(url)}
            assert shown["again"] == local[1][-1][1 + number]
        choice = {"ckpt": str(teachers[1]), "data": str(shards), "out": str(tmp_path / "targets"), "views": 2}
        precompute(PrecomputeConfig.model_validate(choice | {"workers": 0}), Console(quiet=True))
        mixed = student(shards, tmp_path / "mixed", teacher_url=first, targets=str(tmp_path / "targets"))
        assert losses(mixed) == local[1]


def test_a_run_that_was_cut_goes_on_as_if_it_was_not(shards, teachers, tmp_path):
    def part(name, *, last_step=NUM_STEPS, order=teachers, resume=False):
        config = of(
            StudentRun,
            shards,
            tmp_path / name,
            steps=NUM_STEPS,
            teacher_ckpt=[str(ckpt) for ckpt in order],
            keep_every=1,
            resume=resume,
        )
        with claimed(config) as checkpoint, opened(config, ALONE) as (_, sources), suppress(StoppedError):
            clips = ClipsUntil(config, last_step)
            train_on(clips, sources, config, ALONE, checkpoint)  # type: ignore[arg-type]
        return losses([MetricsLine.model_validate(line) for line in read_metrics(tmp_path / name)])

    assert len(part("cut", last_step=2)) == 2
    with pytest.raises(ValueError, match="expected those that the run began with, in their order"):
        part("cut", order=teachers[::-1], resume=True)
    assert part("cut", resume=True) == part("whole")


def test_a_checkpoint_knows_which_of_its_outputs_are_of_which_teacher(local, teachers):
    out = local[0]
    config = read_config(out)
    assert config.predictor_out_width == (24, 40)
    whole, parts = load_predictor(out), [load_predictor(out, teacher) for teacher in config.head_of]
    assert torch.equal(whole.head.weight, torch.cat([part.head.weight for part in parts]))
    clip = torch.randint(256, (1, 4, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    group = mask_group(config.mask, config.grid, seed=0, step=1, group=0, batch_size=1)
    for ckpt in teachers:
        [pictures] = panels.predictions(out, "run", group, clip, teacher=str(ckpt))
        assert all("predicts of" in picture.title for picture in pictures)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"order": [0, 0]}, "expected different ones: a teacher that counts for more has a larger"),
        ({"order": [0, 1], "teacher_weight": [1]}, "got --teacher-weight 1 for 2 teacher(s), expected"),
        ({"order": [0], "teacher_weight": [2]}, "got --teacher-weight 2 for 1 teacher(s), expected none"),
        ({"order": [0, 1], "view": {"crop_size": 48}, "encoder": {"patch_size": 12}}, "got a token grid of"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(shards, teachers, tmp_path, values, sentence):
    ckpts = [teachers[number] for number in values.pop("order")]
    with pytest.raises(ValueError, match="got") as refused:
        student(shards, tmp_path / "run", *ckpts, **values)
    assert sentence in str(refused.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
