"""What a user gets wrong is one ``error:`` line with exit code 1 or 2: no traceback, no half a file."""

import ctypes
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_commands import APPS, COMMANDS, arguments
from train_tools import small_run
from train_tools import train as train_here

from salt_distill.common.command import run_app
from salt_distill.common.config import EmbedConfig, TeacherRun
from salt_distill.common.data.making.cli import app as data_app
from salt_distill.common.devices import device_here
from salt_distill.common.model.checkpoint import find_checkpoint
from salt_distill.common.untouched import left_as_it_was
from salt_distill.student_trainer.cli import app as train_app
from salt_distill.student_trainer.evaluation.cli import app as eval_app
from salt_distill.teacher_server.cli import app as serve_app

RUN = [
    *("teacher", "--preset", "nano", "--workers", "0", "--steps", "2", "--batch-size", "6"),
    *("--set", "encoder.width=24", "--set", "encoder.num_heads=2", "--set", "encoder.depth=1"),
    *("--set", "encoder.mlp_width=48", "--set", "predictor.width=24", "--set", "predictor.mlp_width=48"),
]
BRIEF = {"steps": 2, "batch_size": 6, "loader": {"decode_processes": 0}, "optim": {"warmup_steps": 1}}


@contextmanager
def full_disk(max_bytes: int = 2000) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_powers() -> Iterator[None]:
    """This thread may write what its user may: root without the capabilities that open everything to it."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    fewer = (ctypes.c_uint32 * 6)(before[0] & ~0b110, *before[1:])  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


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
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

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


def test_wrong_places(said, shards, tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "file").write_text("")
    data = ("--data", shards)
    for line, expected in {
        (*data, "--out", tmp_path / "file"): f"got --out {tmp_path}/file, which is a file",
        (
            "--data",
            tmp_path / "none",
            "--out",
            tmp_path / "run",
        ): f"error: {tmp_path}/none: got no dataset.json",
        (*data, "--out", tmp_path / "run", "--config", tmp_path / "none.yaml"): (
            f"{tmp_path}/none.yaml: No such file or directory"
        ),
        (*data, "--out", tmp_path / "run", "--config", tmp_path / "bad.yaml"): f"{tmp_path}/bad.yaml",
        (*data, "--out", tmp_path / "run", "--set", "mask.sets=[1"): "while parsing a flow sequence",
        (*data, "--out", tmp_path / "run", "--estimate", "--estimate-out", "/dev/full"): (
            "No space left on device"
        ),
    }.items():
        assert expected in said(train_app, *RUN, *line), line
    monkeypatch.setattr(sys, "argv", ["salt", *map(str, (*RUN, *data, "--out", tmp_path / "run"))])
    with pytest.raises(SystemExit) as ended:
        run_app(train_app)  # nothing of what went wrong is in the way
    assert ended.value.code == 0
    assert find_checkpoint(tmp_path / "run").name == "step-2"


@pytest.mark.parametrize("command", [name for name in COMMANDS if "out" in COMMANDS[name][0].model_fields])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(command, said, tmp_path):
    """What the command reads is not there either: the place comes first."""
    app, *names = command.split()
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "closed").mkdir(mode=0o555)
    name = Path(COMMANDS[command][1]["out"]).name if "out" in COMMANDS[command][1] else "out"
    os.mkfifo(tmp_path / f"pipe.{name}")  # as /dev/null, which a whole file would take the place of
    before = sorted(tmp_path.rglob("*"))
    for out, expected in {
        tmp_path / "file" / "sub" / name: f"but {tmp_path}/file is a file, expected a folder",
        tmp_path / "dangling" / name: (
            f"but {tmp_path}/dangling is a link to {tmp_path}/nowhere, which is not there"
        ),
        tmp_path / "closed" / "sub" / name: (
            f"but nothing can be written in {tmp_path}/closed: Permission denied"
        ),
        Path("/proc") / name: "but nothing can be written in /proc: No such file or directory",
        tmp_path / f"pipe.{name}": "which is neither a file nor a folder",
    }.items():
        line = arguments(command, COMMANDS[command][1] | {"out": str(out)})
        with no_powers():
            assert said(APPS[app], *names, *line) == f"error: got {out}, {expected}"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_names_what_cannot_be_written(said, shards, copy, synth_videos, tmp_path):
    """Folders of a work that is continued stay, without a file that looks whole."""
    full = tmp_path / "full"
    models = ("--ckpt", copy, "--data", shards)
    for out, named, app, *line in (
        ("page.html", "page.html", eval_app, "report", copy, "--out"),
        ("rank.json", "rank.json", eval_app, "rank", *models, "--split", "train", "--out"),
        ("probe.json", ".probe.json.training/", eval_app, "probe", *models, "--set", "epochs=1", "--out"),
        ("rows.parquet", ".rows.parquet.parts/", eval_app, "embed", "--ckpt", copy, synth_videos, "--out"),
        ("targets", "targets/", serve_app, "precompute", *models, "--views", 1, "--workers", 0, "--out"),
        ("shards", "shards", data_app, "pack", synth_videos, "--workers", 1),
        ("videos", "videos/", data_app, "synth"),
    ):
        with full_disk(300):
            sentence = said(app, *line, full / out)
        assert sentence.startswith(f"error: {full}/{named}"), sentence
        assert "File too large" in sentence or "could not be written" in sentence, sentence
        assert not (full / out).is_file()
    left = {path.name for path in full.rglob("*") if path.is_file()}
    assert left <= {".partial-shards.jsonl", "toy-000000.tar"}, left


def test_a_ray_that_is_not_there_is_named_in_every_command(said, shards, done, tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").write_text(
        f"common: {{data: {shards}, teacher_ckpt: {done}, preset: nano, steps: 100}}\nruns: {{a: {{}}}}\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = f"127.0.0.1:{other.getsockname()[1]}"
    out = ("--out", tmp_path / "out")
    for app, *line in (
        (train_app, *RUN, "--workers", 1, "--data", shards, *out),
        (train_app, "sweep", tmp_path / "sweep.yaml", *out),
        (eval_app, "probe", "--ckpt", done, "--data", shards, "--workers", 1, *out),
        (eval_app, "embed", "--ckpt", done, tmp_path, "--workers", 1, "--out", tmp_path / "out.parquet"),
        (serve_app, "teacher", "--ckpt", done, "--port", 0),
        (serve_app, "precompute", "--ckpt", done, "--data", shards, "--views", 1, *out),
    ):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert f"got --address {free}, where no Ray answers" in said(app, *line, "--address", free)
        monkeypatch.setenv("RAY_ADDRESS", free)
        assert f"got RAY_ADDRESS={free}, where no Ray answers" in said(app, *line)


def test_runs_that_cannot_go_on(said, shards, copy, tmp_path):
    resumed = ("--data", shards, "--resume", "--config", copy / "config.yaml", "--out", copy)
    teacher = ("teacher", "--preset", "nano", "--workers", "0")
    (copy / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    assert f"error: {copy}: got no metrics.jsonl, or an empty one" in said(train_app, *teacher, *resumed)
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
    assert f"error: {copy}/config.yaml: got no YAML" in said(train_app, *teacher, *resumed)


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
    with full_disk():  # TensorBoard's thread meets it first
        sentence = said(train_app, *RUN, "--data", shards, "--out", tmp_path / "fuller")
    assert "fuller/tensorboard: File too large" in sentence
    with full_disk(max_bytes=30_000):
        sentence = said(train_app, *RUN, "--data", shards, "--out", tmp_path / "full")
    assert "step-2 could not be written" in sentence
    assert list((tmp_path / "full").glob("checkpoints/*")) == []


def test_a_full_disk_stops_an_export(said, copy, tmp_path):
    for format in ("hf", "vjepa2"):
        out = tmp_path / f"out-{format}"
        with full_disk():
            sentence = said(eval_app, "export", "--ckpt", copy, "--format", format, "--out", out)
        assert f"{out} could not be written" in sentence
        assert not out.exists()
        assert not list(tmp_path.glob(".partial*"))


def test_the_traceback_stays_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("SALT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["salt", *RUN, "--data", "none", "--out", str(tmp_path / "run")])
    with pytest.raises((ValueError, OSError)):
        run_app(train_app)


def test_a_failed_start_leaves_out_as_it_was_and_corrected_it_works(
    said, done, shards, tmp_path, monkeypatch
):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = f"127.0.0.1:{other.getsockname()[1]}"
    none, student = tmp_path / "none", ("student", *RUN[1:], "--data", shards)
    wrong_run = tmp_path / "wrong.yaml"
    wrong_run.write_text(
        f"common: {{preset: nano, steps: 100, data: {none}, teacher_ckpt: {done}}}\nruns: {{a: {{}}}}\n"
    )
    before = sorted(tmp_path.rglob("*"))
    for out in ("new/below", "there"):
        for app, *line in (
            (train_app, *RUN, "--data", none),
            (train_app, *RUN, "--data", none, "--workers", 1),
            (train_app, *RUN, "--data", shards, "--split", "none", "--workers", 1),
            (train_app, *RUN, "--data", shards, "--init", none),
            (train_app, *RUN, "--data", shards, "--workers", 1, "--address", free),
            (train_app, *student, "--teacher-ckpt", none),
            (train_app, *student, "--targets", none),
            (train_app, *student, "--teacher-url", f"http://{free}", "--set", "client.connect_budget_s=0.2"),
            (train_app, "sweep", wrong_run),
            (serve_app, "precompute", "--views", 1, "--ckpt", done, "--data", none, "--workers", 0),
            (serve_app, "precompute", "--views", 1, "--ckpt", done, "--data", none),
            (serve_app, "precompute", "--views", 1, "--ckpt", none, "--data", shards, "--workers", 0),
            (serve_app, "precompute", "--views", 1, "--ckpt", done, "--data", shards, "--address", free),
        ):
            said(app, *line, "--out", tmp_path / out)
            assert sorted(tmp_path.rglob("*")) == before, line
    probe = ("probe", "--ckpt", done, "--data", shards, "--out", tmp_path / "new" / "probe.json")
    embed = ("embed", "--ckpt", done, "--out", tmp_path / "new" / "rows.parquet")
    for line in (
        ("probe", "--ckpt", none, *probe[3:]),
        (*probe, "--workers", 1, "--address", free),
        (*embed, none),
        (*embed, shards, "--workers", 1, "--address", free),
    ):
        said(eval_app, *line)
        assert sorted(tmp_path.rglob("*")) == before, line
    for out in ("new/below", "there"):
        arguments = ["salt", *map(str, (*RUN, "--data", shards, "--out", tmp_path / out))]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            run_app(train_app)
        assert ended.value.code == 0
        assert find_checkpoint(tmp_path / out).name == "step-2"
    assert (tmp_path / "there" / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("is_of_use", [True, False])
def test_a_folder_that_somebody_goes_on_from_stays(is_of_use, tmp_path):
    place = tmp_path / "above" / "out"

    def fail() -> None:
        with left_as_it_was(place, unless=lambda: is_of_use):
            (place / "part").mkdir(parents=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "above").exists() == is_of_use


def test_a_paper_size_without_a_gpu_is_refused_at_once(said, shards, tmp_path):
    """The default preset on a laptop ended after minutes in the kernel's out-of-memory killer."""
    out = tmp_path / "run"
    for more in ([], ["--workers", "0"], ["--gpus-per-worker", "0"], ["--dry-run"]):
        sentence = said(train_app, "teacher", "--data", str(shards), "--out", str(out), *more)
        assert "got an encoder of width 1024 and depth 24 without a GPU, expected a GPU" in sentence
        assert "--preset nano" in sentence
        assert "--device cpu" in sentence
        assert not out.exists()
    base = ["teacher", "--data", str(shards), "--out", str(out), "--device", "cpu"]
    assert "got --device cpu with --gpus-per-worker 1" in said(train_app, *base, "--gpus-per-worker", "1")
    # What was asked for is begun: it comes to the data, which is not there.
    assert "nothing-there" in said(train_app, *base, "--workers", "0", "--data", "nothing-there")


def test_no_gpus_for_a_worker_is_the_cpu_without_workers_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = ({}, {"gpus_per_worker": 1}, {"gpus_per_worker": 0}, {"device": "cpu"})
    configs = [
        EmbedConfig.model_validate({"ckpt": "c", "videos": "v", "out": "o.parquet"} | one) for one in asked
    ]
    assert [device_here(config).type for config in configs] == ["cuda", "cuda", "cpu", "cpu"]


def test_an_address_where_a_path_is_meant_is_no_folder_of_that_name(said, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for app, line, expected in (
        (
            train_app,
            (*RUN, "--data", shards, "--out", "s3://b/run"),
            "--out s3://b/run, an address, expected a",
        ),
        (data_app, ("pack", shards, "s3://b/out"), "got OUT s3://b/out, an address, expected a path of this"),
        (data_app, ("inspect", "s3://b/shards"), "got DATA s3://b/shards, an address, expected a path"),
        (data_app, ("mix", "s3://b/recipe.yaml", "out"), "got RECIPE s3://b/recipe.yaml, an address"),
    ):
        assert expected in said(app, *line)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_a_png_by_its_name_too(said, shards, tmp_path):
    sentence = said(data_app, "inspect", shards, "--sheet", tmp_path / "x.jpg")
    assert "x.jpg" in sentence
    assert "expected a file name that ends in .png" in sentence


def test_the_page_of_numbers_has_no_place_outside_the_repository(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(eval_app, "fidelity").endswith(
        "got --out docs/fidelity.md, but there is no folder docs here: give --out FILE.md"
    )


def test_a_cache_folder_with_other_files_is_refused_before_a_ray_starts(said, done, tmp_path):
    """A replica found it out, after a minute and a traceback."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    sentence = said(serve_app, "teacher", "--ckpt", done, "--port", 0, "--cache", tmp_path / "home")
    assert "has thesis.tex in it, expected an empty folder or one of a target cache" in sentence
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]
