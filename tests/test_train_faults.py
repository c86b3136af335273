"""Training in Ray's workers that is killed at some step: what is learned in the end is what an uninterrupted
run learned. Slow: `make test-faults`."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_tools import SMALL, losses, salt, train_teacher, write_targets
from serve_tools import command_lines, end, start

from salt_distill.common.model.checkpoint import find_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STEPS = 120
COMMON = [*SMALL, "--steps", STEPS, "--batch-size", 192, "--keep-every", 5]
TWO = ["--workers", 2, "--cpus-per-worker", 0.5]


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory) -> Path:
    return train_teacher(shards, tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def run_of(teacher, shards, tmp_path_factory):
    """Arguments of a kind of run: three objectives, three sources of targets."""
    targets = tmp_path_factory.mktemp("targets") / "targets"

    def arguments(name: str) -> list[object]:
        if name == "cached" and not targets.exists():
            write_targets(teacher, shards, targets)
        if name == "served" and not servers:
            servers.append(start(teacher, "--set", "teacher.batch_size=16"))
        kinds = {
            "teacher": ["teacher"],
            "vjepa": ["vjepa", "--set", "ema.start=0.9"],
            "local": ["student", "--teacher-ckpt", teacher],
            "cached": ["student", "--targets", targets],
            "served": ["student", "--teacher-url", servers[0][1] if servers else None],
        }
        return [*kinds[name], "--data", shards, *COMMON]

    servers: list[tuple[subprocess.Popen, str]] = []
    yield arguments
    for server, _ in servers:
        end(server)


@pytest.fixture(scope="module")
def whole(run_of, tmp_path_factory):
    """An uninterrupted run of a kind, in two workers."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / name
            salt("salt-train", *run_of(name), *TWO, "--out", made[name])
        return made[name]

    return of


def training(run: Path, *arguments: object) -> subprocess.Popen:
    """A command that has trained some steps, how many is left to chance."""
    program = [str(Path(sys.executable).parent / "salt-train"), *map(str, arguments), "--out", str(run)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    steps = random.SystemRandom().randint(2, STEPS // 2)  # workers outlive their node by a second or two
    while (
        not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < steps
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def below(process: subprocess.Popen, name: bytes) -> list[int]:
    """The processes of a command's Ray with a name."""
    return [pid for pid, line in command_lines(process.pid).items() if name in b"\0".join(line)]


def assert_same(run: Path, expected: Path) -> None:
    """The same losses at every step, each taken once, and the same weights, to the bit."""
    assert losses(run) == losses(expected)
    assert len(losses(run)) == STEPS
    one, other = find_checkpoint(run), find_checkpoint(expected)
    names = sorted(path.name for path in other.glob("*.safetensors"))
    assert len(names) >= 2
    assert [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []


@pytest.mark.parametrize("victim", ["worker", "driver", "node"])
@pytest.mark.parametrize("name", ["teacher", "vjepa", "local", "cached", "served"])
def test_a_killed_run_goes_on_to_the_bit(name, victim, run_of, whole, tmp_path):
    run = tmp_path / "killed"
    process = training(run, *run_of(name), *TWO)
    pids = {
        "worker": below(process, b"RayTrainWorker")[:1],
        "driver": [process.pid],
        "node": below(process, b"raylet/raylet"),
    }[victim]
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert len(losses(run)) < STEPS
    salt("salt-train", *run_of(name), *TWO, "--out", run, "--resume")
    assert_same(run, whole(name))


def test_a_lost_worker_is_replaced_inside_one_command(run_of, whole, tmp_path):
    run = tmp_path / "replaced"
    process = training(run, *run_of("local"), *TWO, "--max-failures", 1)
    os.kill(random.choice(below(process, b"RayTrainWorker")), signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert_same(run, whole("local"))
    starts = json.loads((run / "environment.json").read_text())
    assert [start["after_step"] for start in starts] == sorted(start["after_step"] for start in starts)
    assert len(starts) == 2


def test_a_run_takes_as_many_workers_as_there_is_room_for(run_of, whole, tmp_path):
    """Two of one to three, of which the machine has room for no more; whatever is wrong with a run itself is
    not tried again."""
    run = tmp_path / "elastic"
    room = ["--workers", "1:3", "--cpus-per-worker", (os.cpu_count() or 1) / 2, "--max-failures", -1]
    salt("salt-train", *run_of("local"), *room, "--out", run)
    assert [start["world_size"] for start in json.loads((run / "environment.json").read_text())] == [2]
    assert losses(run) == losses(whole("local"))
    wrong = salt(
        "salt-train",
        *run_of("local"),
        *room,
        "--out",
        tmp_path / "wrong",
        "--set",
        "encoder.patch_size=16",
        check=False,
    )
    assert wrong.returncode == 1
    assert "token grid" in wrong.stderr
    assert "Traceback" not in wrong.stderr
