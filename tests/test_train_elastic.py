"""An elastic run on a Ray of several nodes that loses one of them: it goes on with fewer workers and learns
the same. Slow: `make test-faults`."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_tools import SMALL, losses, salt, train_teacher
from ray_nodes import Cluster
from safetensors.torch import load_file

from salt_distill.common.model.checkpoint import find_checkpoint, load_training
from salt_distill.student_trainer.job import ENVIRONMENT
from salt_distill.student_trainer.run_directory import read_metrics

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STEPS, BATCH_SIZE, KEEP_EVERY = 120, 192, 5


@pytest.fixture(scope="module")
def student(shards, tmp_path_factory) -> list[object]:
    """Arguments of a run of stage 2."""
    teacher = train_teacher(shards, tmp_path_factory.mktemp("teacher") / "teacher")
    batches = ["--steps", STEPS, "--batch-size", BATCH_SIZE, "--keep-every", KEEP_EVERY]
    # At the preset's rate a spike of the gradient, after a hundred steps, makes percents of a difference in
    # rounding.
    slowly = ["--set", "optim.lr=1e-4", "--set", "optim.start_lr=1e-5", "--set", "optim.final_lr=1e-5"]
    return ["student", "--teacher-ckpt", teacher, "--data", shards, *SMALL, *batches, *slowly]


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory) -> Path:
    """The run, uninterrupted, in one process without Ray."""
    run = tmp_path_factory.mktemp("whole") / "run"
    salt("salt-train", *student, "--workers", 0, "--out", run)
    return run


@pytest.fixture
def cluster():
    cluster = Cluster(ENVIRONMENT)
    yield cluster
    cluster.close()


def starts(run: Path) -> list[dict]:
    return json.loads((run / "environment.json").read_text())


def assert_same_to_rounding(run: Path, whole: Path) -> None:
    """Losses and weights; each step, and so each slot, once."""
    lines, expected = read_metrics(run), read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    found, wanted = (
        torch.tensor([line["loss"] for line in of], dtype=torch.float64) for of in (lines, expected)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    one, other = find_checkpoint(run), find_checkpoint(whole)
    for path in other.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert (load_file(one / path.name)[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
    assert load_training(one)["slot"] == load_training(other)["slot"] == STEPS * BATCH_SIZE


def num_lines(run: Path) -> int:
    """Of its metrics, while they are written."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def begun():
    """Starts a command that trains, and waits until ``steps`` steps of the run are done, or a few more; none
    outlives its test."""
    processes = []

    def start(
        run: Path, steps: int, *arguments: object, environment: dict[str, str] | None = None
    ) -> subprocess.Popen:
        program = [str(Path(sys.executable).parent / "salt-train"), *map(str, arguments), "--out", str(run)]
        process = subprocess.Popen(
            program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        while num_lines(run) < steps:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_run_that_loses_a_node_goes_on_with_one_worker(student, whole, cluster, begun, tmp_path):
    run = tmp_path / "run"
    nodes = [cluster.add(), cluster.add()]
    workers = ["--workers", "1:2", "--cpus-per-worker", 1, "--max-failures", 1, "--address", cluster.address]
    process = begun(run, 3 * KEEP_EVERY, *student, *workers, environment=cluster.environment)
    nodes[1].kill()
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert [start["world_size"] for start in starts(run)] == [2, 1]
    assert 0 < starts(run)[1]["after_step"] < STEPS
    assert starts(run)[1]["after_step"] % KEEP_EVERY == 0
    assert_same_to_rounding(run, whole)


def test_a_run_takes_a_node_that_comes_later(student, cluster, begun, tmp_path):
    """Ray looks a minute after a start; a run of many steps is still there, and is ended when it has gone
    on."""
    run = tmp_path / "run"
    nodes = [cluster.add(), cluster.add()]
    workers = ["--workers", "1:2", "--cpus-per-worker", 1, "--max-failures", 1, "--address", cluster.address]
    process = begun(
        run, 3 * KEEP_EVERY, *student, *workers, "--steps", 100_000, environment=cluster.environment
    )
    nodes[1].kill()
    while len(starts(run)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.5)
    cluster.add()
    while [start["world_size"] for start in starts(run)] != [2, 1, 2] or num_lines(run) <= starts(run)[2][
        "after_step"
    ]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.5)
    process.terminate()
    process.communicate(timeout=90)
    assert 0 < starts(run)[1]["after_step"] < starts(run)[2]["after_step"]
    assert len(losses(run)) > starts(run)[2]["after_step"]


def test_a_run_is_stopped_and_started_with_another_number_of_workers(student, whole, begun, tmp_path):
    """Stopped in order with two workers, killed with three, ended with one."""
    run = tmp_path / "run"
    share = ["--cpus-per-worker", 0.5]
    for end, number, steps, resume in (
        (signal.SIGTERM, 2, STEPS // 4, []),
        (signal.SIGKILL, 3, STEPS // 2, ["--resume"]),
    ):
        process = begun(run, steps, *student, "--workers", number, *share, *resume)
        process.send_signal(end)
        process.communicate(timeout=90)
        assert process.returncode != 0
        assert len(losses(run)) < STEPS
    salt("salt-train", *student, "--workers", 1, *share, "--out", run, "--resume")
    assert [start["world_size"] for start in starts(run)] == [2, 3, 1]
    assert 0 < starts(run)[1]["after_step"] < starts(run)[2]["after_step"] < STEPS
    assert_same_to_rounding(run, whole)
