"""The package as it is installed: one name, from a wheel, in a folder with other people's modules."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import teacher_tools
import torch
from rich.console import Console
from teacher_tools import serving

from salt_distill import CachedTargets, Clips, TeacherClient
from salt_distill.common.config import PrecomputeConfig
from salt_distill.teacher_server.precompute import precompute

ROOT = Path(__file__).parents[1]
VIEW = {"num_frames": 4, "frame_step": 1, "crop_size": 16}
ROOMS = ("common", "teacher_server", "student_trainer")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def run(*program: object, cwd: Path, **environment: str) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, program)),
        cwd=cwd,
        env={**outside, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{program}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def real_files() -> set[str]:
    files = {
        f"salt_distill/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return {*files, *(f"salt_distill/{path.name}" for path in (ROOT / "salt_distill").glob("*.py"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel that was built from the source archive, as `pip install` from an index would."""
    folder = tmp_path_factory.mktemp("wheel")
    source, out = folder / "source", folder / "out"
    source.mkdir()
    for name in (*ROOMS, "salt_distill", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-a", ROOT / name, source, cwd=folder)
    run(sys.executable, "-c", BUILD, "build_sdist", out, cwd=source)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert not [member.name for member in tar if member.issym()]
        tar.extractall(out, filter="data")
    run(sys.executable, "-c", BUILD, "build_wheel", out, cwd=out / archive.name.removesuffix(".tar.gz"))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel in it; its programs are in ``bin``."""
    folder = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", folder)
    run(sys.executable, *pip, wheel, cwd=folder)
    return folder


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A folder of somebody's own modules, with the names of ours and of what we import."""
    for name in (*ROOMS, "click", "typer", "numpy", "yaml", "queue"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('somebody else owns {name}')\n")
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("raise SystemExit('somebody else owns common')\n")
    return tmp_path


def test_archive_and_wheel_hold_the_real_files(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == real_files()


def test_every_command_loads_beside_modules_of_the_same_names(installed, hostile, tmp_path_factory):
    """Every function of every command is imported by a program that stands beside the installed ones."""
    commons = tmp_path_factory.mktemp("path")
    (commons / "common").mkdir()
    (commons / "common" / "__init__.py").write_text("raise SystemExit('somebody else owns common')\n")
    program = installed / "bin" / "every-command"
    program.write_text(
        "import importlib, inspect, re\n"
        "from importlib.metadata import entry_points, distribution\n"
        "import salt_distill\n"
        f"assert salt_distill.__file__.startswith({str(installed)!r}), salt_distill.__file__\n"
        "scripts = [one for one in distribution('salt-distill').entry_points]\n"
        "for script in scripts:\n"
        "    group = re.search(r'from (\\S+) import main', inspect.getsource(script.load()))[1]\n"
        "    source = inspect.getsource(importlib.import_module(group))\n"
        "    for module, function in re.findall(r'\"(salt_distill[\\w.]+):(\\w+)\"', source):\n"
        "        assert callable(getattr(importlib.import_module(module), function))\n"
        "        print(module, function)\n"
    )
    said = run(sys.executable, program, cwd=hostile, PYTHONPATH=f"{commons}:{installed}")
    assert len(said.split("\n")) > 25, said


def test_a_program_and_its_helpers_run_there(installed, hostile, synth_videos):
    """`salt-data pack` reads videos in processes of its own."""
    source = hostile / "videos"
    source.mkdir()
    for video in sorted(synth_videos.rglob("*.mp4"))[:2]:
        (source / video.name).symlink_to(video)
    pack = [installed / "bin" / "salt-data", "pack", "videos", "shards", "--workers", 1]
    said = run(*pack, cwd=hostile, PYTHONPATH=str(installed))
    assert "shards: 2 videos" in said
    assert (hostile / "shards" / "index.parquet").exists()


@pytest.mark.faults
def test_a_private_ray_and_its_workers_run_there(installed, hostile, shards):
    program = installed / "bin" / "salt-train"
    values = ["--data", shards, "--out", "run", "--workers", 1, "--preset", "nano", "--steps", 2]
    small = [*values, "--batch-size", 8, "--set", "optim.warmup_steps=1"]
    run(program, "teacher", *small, cwd=hostile, PYTHONPATH=str(installed))
    assert (hostile / "run" / "checkpoint").exists()


@pytest.fixture(scope="module")
def teacher_folder(shards, tmp_path_factory) -> Path:
    """A folder with what the page needs: shards, a teacher of their clips, its targets."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "shards").symlink_to(shards)
    teacher, out = str(teacher_tools.save_teacher(folder / "teacher")), str(folder / "targets")
    config = PrecomputeConfig(ckpt=teacher, data=str(shards), out=out, views=1, workers=0)
    precompute(config, Console(quiet=True))
    return folder


def test_what_the_page_of_the_python_names_says(installed, teacher_folder):
    """docs/python.md, block after block, from the installed wheel and in another folder."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    with serving(teacher_tools.load_teacher(teacher_folder / "teacher")) as (url, _):
        program = "\n".join([f"url = {url!r}", *blocks])
        said = run(sys.executable, "-P", "-c", program, cwd=teacher_folder, PYTHONPATH=str(installed))
    assert "(4, 4, 16, 16, 3) uint8" in said
    assert "torch.Size" in said


def test_public_names_have_docstrings_and_are_listed(installed):
    program = (
        "import sys, salt_distill\n"
        "assert 'torch' not in sys.modules  # nothing is imported before it is used\n"
        "for name in salt_distill.__all__:\n"
        "    assert getattr(salt_distill, name).__doc__, name\n"
    )
    run(sys.executable, "-P", "-c", program, cwd=installed, PYTHONPATH=str(installed))
    page = (ROOT / "docs" / "python.md").read_text()
    for name in ("Clips", "load_encoder", "normalise", "TeacherClient", "CachedTargets", "masks"):
        assert f"`{name}`" in page or f"import {name}" in page or f", {name}" in page, name


def test_targets_are_the_same_from_a_service_and_from_a_cache(teacher_folder):
    with (
        serving(teacher_tools.load_teacher(teacher_folder / "teacher")) as (url, _),
        Clips(teacher_folder / "shards", batch_size=4, views=1, **VIEW) as clips,
    ):
        client = TeacherClient(url)
        served = client(clips[3])
        client.close()
        cached = CachedTargets(teacher_folder / "targets")
        assert torch.equal(served, cached(clips[3]))
        assert torch.equal(served, cached(clips[3].pixels))
        with pytest.raises(ValueError, match="expected a clip whose target is in the cache"):
            cached(clips[3].pixels + 1)


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_the_readmes_first_commands_as_they_stand(installed, tmp_path):
    """But for `pip install`: the wheel is installed."""
    (block,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if block.startswith("pip install")
    ]
    path = f"{installed / 'bin'}:{os.environ['PATH']}"
    for line in block.splitlines()[1:]:
        run("bash", "-c", line, cwd=tmp_path, PATH=path, PYTHONPATH=str(installed))
    assert (tmp_path / "features.parquet").exists()
