"""`salt-eval probe` in Ray's workers: the accuracies of one process, also after a kill and with another
number of workers. Slow: `make test-faults`."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_tools import salt
from eval_tools import make_dataset, make_run

from salt_distill.common.data.shards import open_dataset

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

EPOCHS = 60
FEW = ["--epochs", EPOCHS, "--batch-size", 8, "--set", "lr=[5e-3,1e-4]", "--set", "loader.decode_processes=0"]
TWO, THREE = (["--workers", number, "--cpus-per-worker", 0.5] for number in (2, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three splits; a clip to learn from cannot be decoded."""
    folder = make_dataset(
        tmp_path_factory.mktemp("eval") / "toy", num_clips=45, splits=("train", "val", "test")
    )
    sample = open_dataset(folder).samples("train")[0][7]
    with (folder / sample.tar).open("r+b") as tar:
        tar.seek(sample.offset)
        tar.write(bytes(sample.size))
    return folder


def arguments(run: Path, data: Path, out: Path) -> list[object]:
    return ["probe", "--ckpt", run, "--random-init", "--data", data, "--out", out, *FEW]


def test_workers_find_what_one_process_finds(data, tmp_path):
    """From files, and from memory: there by a command that is killed, and goes on with one worker more."""
    run, features = make_run(tmp_path / "run", data), tmp_path / "features"
    said = salt("salt-eval", *arguments(run, data, tmp_path / "alone.json"))
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert alone["accuracy"]["run"]["shade"] > 0.8
    kept = []
    for name, more in {
        "files": [*TWO, "--features", features],
        "files-alone": ["--features", features],
    }.items():
        done = salt("salt-eval", *arguments(run, data, tmp_path / f"{name}.json"), *more)
        kept.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert done.stderr.count("left out: toy/019: ") == (name != "files-alone")
        assert not list(tmp_path.glob(".*.training"))
        assert "random-init" in done.stdout
    assert kept[0] == kept[1]
    assert said.stderr.count("left out: toy/019: ") == 1
    assert len(list(features.iterdir())) == 2 * 3

    program = [
        Path(sys.executable).parent / "salt-eval",
        *arguments(run, data, tmp_path / "killed.json"),
        *TWO,
    ]
    state = tmp_path / ".killed.json.training" / "1.pt"  # of the second encoder
    with subprocess.Popen(
        list(map(str, program)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        until = time.monotonic() + 120
        while not state.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    epoch = torch.load(state, weights_only=True)["epoch"]
    assert 0 < epoch < EPOCHS
    assert not (tmp_path / "killed.json").exists()
    salt("salt-eval", *arguments(run, data, tmp_path / "killed.json"), *THREE, "--resume")
    assert json.loads((tmp_path / "killed.json").read_text()) == alone


def test_what_is_wrong_is_one_sentence(data, tmp_path):
    """Of a worker, and of a machine that has too little room for them."""
    run = make_run(tmp_path / "run", data)
    wrong = salt(
        "salt-eval",
        *arguments(run, data, tmp_path / "probe.json"),
        *TWO,
        "--set",
        "loader.max_bad_fraction=0",
        check=False,
    )
    assert wrong.returncode == 1
    assert "got 1 clips that cannot be decoded among" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    wide = salt(
        "salt-eval",
        *arguments(run, data, tmp_path / "probe.json"),
        "--workers",
        2,
        "--cpus-per-worker",
        4096,
        check=False,
    )
    assert wide.returncode == 1
    assert (
        "the run has waited 30 s for a place: it needs 2 workers with 4096 CPUs each, and Ray has"
        in wide.stderr
    )
    assert "Traceback" not in wide.stderr
