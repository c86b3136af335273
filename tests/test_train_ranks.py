"""A run in any number of processes, with plain PyTorch: one loss, each slot once, whichever way the model is
spread and wherever it went on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_tools import BAD_SLOT, Piece, small_run, train_in_processes, train_on_random_clips

from salt_distill.common.config import TeacherRun, TrainConfig, VJepaRun
from salt_distill.common.model.checkpoint import find_checkpoint
from salt_distill.student_trainer.run_directory import check_run, read_metrics

BATCH, STEPS = 100, 10  # four mask groups of 24 clips and one of 4
VALUES = {"batch_size": BATCH, "log_every": 1, "optim": {"warmup_steps": 3, "lr": 1e-3, "clip_grad": 0.5}}
VAL = {"val_every": 5, "val_clips": 40, "val_features": True}  # of five workers two have a mask group of them
VALUES |= VAL
KINDS = (TeacherRun, VJepaRun)


def run_in(out: Path, kind: type[TrainConfig], **values) -> TrainConfig:
    """A run of a kind, which is opened already."""
    config = small_run(kind, **VALUES, out=str(out), **values)
    check_run(config)
    return config


def tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(run)
    return {
        f"{path.name} {name}": tensor
        for path in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[type[TrainConfig], Path]:
    """Uninterrupted runs in one process."""
    torch.set_num_threads(1)
    runs = {kind: tmp_path_factory.mktemp("alone") / kind.__name__ for kind in KINDS}
    for kind, run in runs.items():
        train_on_random_clips(run_in(run, kind))
    return runs


@pytest.mark.slow
def test_workers_that_come_and_go_learn_what_one_does(alone, tmp_path):
    """Five workers of which one has four clips, copies and shards of the model, stops and starts; what was
    sharded goes on alone."""
    five = {kind: tmp_path / f"five-{kind.__name__}" for kind in KINDS}
    changing = tmp_path / "changing"
    pieces = [Piece(run_in(run, kind), 5, STEPS) for kind, run in five.items()]
    run_in(changing, VJepaRun, keep_every=3)
    again = {"out": str(changing), "keep_every": 3, "resume": True, **VALUES}
    sharded = small_run(VJepaRun, **again, compute={"sharding": "fsdp"})
    pieces += [Piece(sharded, 2, 4), Piece(small_run(VJepaRun, **again), 1, 7), Piece(sharded, 3, STEPS)]
    slots = train_in_processes(pieces, tmp_path)
    wanted = [
        (0, 10),
        (0, 10),
        (0, 4),
        (3, 7),
        (6, 10),
    ]  # what came after the newest checkpoint is trained again
    assert slots == [
        list(range(first * BATCH, last * BATCH)) for first, last in wanted
    ]  # each once, whatever the number of workers
    for kind, expected in alone.items():
        one = read_metrics(expected)
        for run in [five[kind]] + ([changing] if kind is VJepaRun else []):
            lines = read_metrics(run)
            assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
            for name in ("loss", "grad_norm"):
                found, wanted_values = (
                    torch.tensor([line[name] for line in of], dtype=torch.float64) for of in (lines, one)
                )
                torch.testing.assert_close(found, wanted_values, rtol=1e-5, atol=0)
            torch.testing.assert_close(found[0], wanted_values[0], rtol=1e-6, atol=0)
            for name, rtol in (("val_loss", 1e-5), ("val_rankme", 1e-3), ("val_knn", 0.1)):
                found_val, alone_val = ([line[name] for line in of if name in line] for of in (lines, one))
                assert len(found_val) == 2
                assert found_val == pytest.approx(alone_val, rel=rtol)
            for name, tensor in tensors(expected).items():
                assert (tensors(run)[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
        summary = json.loads((five[kind] / "summary.json").read_text())  # of all workers
        assert summary["reader"] == {"clips": STEPS * BATCH}
        assert summary["skipped"] == {f"random/{BAD_SLOT}": "it is the bad one"}


@pytest.mark.parametrize("workers", ["8:2", "0:2", "two", "1:2:3", "-1", "1.5"])
def test_what_is_no_number_of_workers_is_refused(workers):
    with pytest.raises(
        ValueError,
        match=(
            rf"got '{workers}', expected a number of workers, or the fewest and the most of them, such as 2:8"
        ),
    ):
        small_run(TeacherRun, workers=workers)


def test_workers_are_at_most_the_mask_groups():
    assert [small_run(TeacherRun, workers=workers, **VALUES).workers for workers in ("0", 5, "2:5")] == [
        0,
        5,
        "2:5",
    ]
    with pytest.raises(ValueError, match="got workers=2:6 for batch_size=100, expected at most 5"):
        small_run(TeacherRun, workers="2:6", **VALUES)
