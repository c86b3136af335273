"""What a user gets wrong is one ``error:`` line with exit code 1 or 2: no traceback, no half a file."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_tools import small_run
from train_tools import train as train_here

from salt_distill.common.command import run_app
from salt_distill.common.config import TeacherRun
from salt_distill.common.model.checkpoint import find_checkpoint
from salt_distill.student_trainer.cli import app as train_app
from salt_distill.student_trainer.evaluation.cli import app as eval_app

RUN = [
    *("teacher", "--preset", "nano", "--workers", "0", "--steps", "2", "--batch-size", "6"),
    *("--set", "encoder.width=24", "--set", "encoder.num_heads=2", "--set", "encoder.depth=1"),
    *("--set", "encoder.mlp_width=48", "--set", "predictor.width=24", "--set", "predictor.mlp_width=48"),
]
BRIEF = {"steps": 2, "batch_size": 6, "loader": {"decode_processes": 0}, "optim": {"warmup_steps": 1}}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 2000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def done(shards, tmp_path_factory) -> Path:
    """A run; read only."""
    out = tmp_path_factory.mktemp("done") / "run"
    train_here(small_run(TeacherRun, **BRIEF, data=str(shards), out=str(out)))
    return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
    out = tmp_path / "copy"
    for path in done.rglob("*"):
        if path.is_file():
            (out / path.relative_to(done)).parent.mkdir(parents=True, exist_ok=True)
            (out / path.relative_to(done)).write_bytes(path.read_bytes())
    return out


@pytest.fixture
def said(monkeypatch, capfd) -> Callable[..., str]:
    """Runs a command line that goes wrong; its one sentence."""

    def said(app, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["salt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_app(app)
        out, error = capfd.readouterr()
        assert stopped.value.code in (1, 2)
        assert "Traceback" not in out + error
        [sentence] = [line for line in error.splitlines() if line.startswith("error: ")]
        return sentence

    return said


def test_wrong_places(said, shards, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "bad.yaml").write_text("a: [")
    data = ("--data", shards)
    for arguments, expected in {
        (*data, "--out", tmp_path / "file"): "which is a file",
        (*data, "--out", tmp_path / "file" / "run"): "Not a directory",
        (*data, "--out", tmp_path / "dangling"): "File exists",
        (*data, "--out", "/proc/run"): "/proc/run: No such file or directory",
        ("--data", tmp_path / "none", "--out", tmp_path / "run"): "none",
        (*data, "--out", tmp_path / "run", "--config", tmp_path / "none.yaml"): "none.yaml",
        (*data, "--out", tmp_path / "run", "--config", tmp_path / "bad.yaml"): "bad.yaml",
        (*data, "--out", tmp_path / "run", "--set", "mask.sets=[1"): "expected",
        (*data, "--out", tmp_path / "run", "--estimate", "--estimate-out", "/dev/full"): "No space left",
    }.items():
        assert expected in said(train_app, *RUN, *arguments), arguments


def test_runs_that_cannot_go_on(said, shards, copy, tmp_path):
    resumed = ("--data", shards, "--resume", "--config", copy / "config.yaml", "--out", copy)
    teacher = ("teacher", "--preset", "nano", "--workers", "0")
    (copy / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    assert "metrics.jsonl" in said(train_app, *teacher, *resumed)
    (tmp_path / "metrics.jsonl").rename(copy / "metrics.jsonl")
    environment = (copy / "environment.json").read_bytes()
    (copy / "environment.json").write_text("")
    assert "environment.json: got a damaged file" in said(train_app, *teacher, *resumed)
    (copy / "environment.json").write_bytes(environment)
    training = find_checkpoint(copy) / "training.pt"
    training.write_bytes(training.read_bytes()[:100])
    assert "training.pt: got 100 bytes" in said(train_app, *teacher, *resumed)
    (copy / "config.yaml").rename(tmp_path / "config.yaml")
    (copy / "config.yaml").write_text("steps: [")
    resumed = ("--data", shards, "--resume", "--config", tmp_path / "config.yaml", "--out", copy)
    assert "expected" in said(train_app, *teacher, *resumed)


def test_configurations_that_cannot_work(said, shards, tmp_path):
    for key, value, expected in (
        ("predictor.num_heads", "8", "a head width of 3, expected an even one"),
        ("view.scale", "[1.0, 0.5]", "expected the least and the largest share"),
        ("view.scale", "[0.5, 1.5]", "at most 1"),
        ("view.ratio", "[2, 1]", "expected the least width over height first"),
        ("optim.lr", "inf", "optim.lr"),
        ("optim.lr", "nan", "optim.lr"),
        ("optim.betas", "[0.9, 1]", "optim.betas"),
        ("optim.warmup_steps", "2", "expected a warm-up shorter than the run"),
    ):
        out = tmp_path / "run"
        assert expected in said(train_app, *RUN, "--data", shards, "--out", out, "--set", f"{key}={value}")
        assert not out.exists()


def test_runs_that_stop(said, shards, tmp_path):
    """The preset's warm-up of 30 steps is shortened, with a line: nobody typed it."""
    arguments = (*RUN, "--data", shards, "--out", tmp_path / "run")
    sentence = said(train_app, *arguments, "--set", "optim.lr=1e38", "--set", "optim.start_lr=1e38")
    assert "has loss" in sentence
    assert "lower optim.lr" in sentence
    with full_disk():
        sentence = said(train_app, *RUN, "--data", shards, "--out", tmp_path / "full")
    assert "step-2 could not be written" in sentence
    assert list((tmp_path / "full").glob("checkpoints/*")) == []


def test_a_full_disk_stops_an_export(said, copy, tmp_path):
    for format in ("hf", "vjepa2"):
        out = tmp_path / f"out-{format}"
        with full_disk():
            said(eval_app, "export", "--ckpt", copy, "--format", format, "--out", out)
        assert not out.exists()
        assert not list(tmp_path.glob(".partial*"))


def test_the_traceback_stays_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("SALT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["salt", *RUN, "--data", "none", "--out", str(tmp_path / "run")])
    with pytest.raises((ValueError, OSError)):
        run_app(train_app)
