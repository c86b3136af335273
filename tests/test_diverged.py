"""A loss that is not finite: its update is left out, step and clips are named, no checkpoint follows, and the
run stops."""

import re
from pathlib import Path

import pytest
import torch
from train_tools import ALONE, CPU, RandomClips, batch_of, new_model, small_run, tensors_of

from salt_distill.common.config import StudentRun, TeacherComputeConfig, TeacherRun
from salt_distill.common.model.checkpoint import save_checkpoint
from salt_distill.common.model.teacher import Teacher
from salt_distill.student_trainer.loop import Worker, train_on, update
from salt_distill.student_trainer.metrics import DivergedError
from salt_distill.student_trainer.objective import new_objective
from salt_distill.student_trainer.optim import new_optimizer
from salt_distill.student_trainer.targets.local_targets import LocalTargets

POISONED_SLOT = 2 * 30 + 25  # of the third step: the second rank's, where there are two


class PoisonedTargets(LocalTargets):
    """A teacher in this process, one of whose targets is damaged where nobody checks it."""

    def _compute(self, batch):
        out = super()._compute(batch)
        for row, key in enumerate(batch.keys):
            if key == f"random/{POISONED_SLOT}":
                out[row, :, 0] = torch.inf
        return out


def run_of(out, **values):
    return small_run(StudentRun, out=str(out), teacher_ckpt="none", **values)


def train(out: Path, worker: Worker, **values) -> str:
    """What stopped the run."""
    config = run_of(out, **values)
    if worker.rank == 0:
        out.mkdir(exist_ok=True)
    source = PoisonedTargets(
        Teacher.load(out.parent / "teacher", TeacherComputeConfig(), CPU), config.target_dtype
    )
    try:
        with pytest.raises(DivergedError) as stopped:
            train_on(RandomClips(config.view.clip_shape), [source], config, worker, None)
    finally:
        source.close()
    return str(stopped.value)


@pytest.fixture
def folder(tmp_path):
    config = small_run(TeacherRun)
    objective, checkpoint_config = new_objective(config)
    save_checkpoint(tmp_path / "teacher", checkpoint_config, tensors_of(objective), {})
    return tmp_path


@pytest.mark.parametrize(
    ("values", "checkpoints"),
    [({"keep_every": 1}, {"step-1", "step-2"}), ({"log_every": 4, "keep_every": 5}, set())],
)
def test_step_and_clip_are_named_and_no_checkpoint_follows(folder, values, checkpoints):
    said = train(folder / "run", ALONE, **values)
    assert re.match(
        r"step 3 has loss (inf|nan) and a gradient of norm \S+, expected .*\(from 1 clips,"
        rf" random/{POISONED_SLOT}\)",
        said,
    )
    assert {path.name for path in (folder / "run" / "checkpoints").glob("*")} == checkpoints


def train_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    said = train(folder / "run", Worker(rank=rank, world_size=2, device=CPU), keep_every=1)
    (folder / f"said-{rank}").write_text(said)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_rank_names_the_clip_of_one(folder):
    (folder / "run").mkdir()
    torch.multiprocessing.spawn(train_rank, (folder,), nprocs=2)
    said = [(folder / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert f"(from 1 clips, random/{POISONED_SLOT})" in said[0]


def test_the_update_that_is_left_out_changes_nothing():
    config = small_run(TeacherRun)
    objective, _ = new_model(config)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    update(objective, optimizer, batch_of(config), (), config, ALONE)
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    state = [
        {name: value.clone() for name, value in optimizer.state[parameter].items()}
        for parameter in objective.parameters()
    ]
    hook = objective.predictor.mask_tokens.register_hook(lambda gradient: gradient * torch.nan)
    done = update(objective, optimizer, batch_of(config, 2), (), config, ALONE)
    assert done.loss.isfinite()
    assert not done.norm.isfinite()
    for number, parameter in enumerate(objective.parameters()):
        assert torch.equal(parameter, before[number])
        assert all(
            torch.equal(value, state[number][name]) for name, value in optimizer.state[parameter].items()
        )
    hook.remove()
    overflow = objective.predictor.register_forward_hook(
        lambda module, given, prediction: prediction + torch.inf
    )
    done = update(objective, optimizer, batch_of(config, 2), (), config, ALONE)
    overflow.remove()
    assert not done.loss.isfinite()
    assert all(
        torch.equal(parameter, old) for parameter, old in zip(objective.parameters(), before, strict=True)
    )
    update(objective, optimizer, batch_of(config, 2), (), config, ALONE)
    assert not any(
        torch.equal(parameter, old) for parameter, old in zip(objective.parameters(), before, strict=True)
    )
