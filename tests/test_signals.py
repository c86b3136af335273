"""SIGTERM and Ctrl-C end every command at every moment: soon, without a traceback, with nothing left."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from command_tools import SMALL
from serve_tools import alive, descendants
from teacher_tools import save_teacher

from salt_distill.common import private_ray

NUMBERS = (signal.SIGTERM, signal.SIGINT)
CODES = {number: (-number, 128 + number) for number in NUMBERS}
"""Of a process that a signal ended, before and after it began to work."""
COMMANDS = {
    "teacher": ("serve", "teacher --ckpt TEACHER --port 0 --cpus 0.5"),
    "precompute": ("serve", "precompute --ckpt TEACHER --data SHARDS --views 400 --workers 1 --out OUT"),
    "student": ("train", "student --teacher-ckpt TEACHER --data SHARDS --workers 1 --out OUT SMALL"),
    "sweep": ("train", "sweep SWEEP --out OUT"),
    "probe": ("evaluate", "probe --ckpt TEACHER --data SHARDS --workers 1 --out OUT/probe.json"),
}
"""Those that start a Ray."""


def begin(program: str, *arguments: str, begins: str = "pass") -> subprocess.Popen[str]:
    run = (
        f"import sys; sys.argv[0] = 'salt'; from salt_distill import programs; {begins}; programs.{program}()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", run, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def test_every_command_is_a_program_that_a_signal_may_end_while_it_is_imported():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {name.partition(":")[0] for name in project["scripts"].values()} == {"salt_distill.programs"}
    for number in NUMBERS:
        for moment_s in (0.0, 0.1):
            process = begin("train", "teacher", begins="print('imported', flush=True)")
            assert process.stdout is not None
            assert process.stdout.readline() == "imported\n"
            time.sleep(moment_s)
            process.send_signal(number)
            assert process.communicate(timeout=10) == ("", "")
            assert process.returncode == -number


WORK = """
import os, pathlib, signal, sys, time
from salt_distill.common import termination
from salt_distill.common.whole import whole_file
termination._UNWIND_S = 0.5
with termination.ended_by_signals(), whole_file(pathlib.Path(sys.argv[2])) as partial:
    partial.write_text("half")
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(30)
    except KeyboardInterrupt:  # as a library may that a signal interrupts
        if len(sys.argv) == 3:
            raise
    time.sleep(30)
"""


@pytest.mark.parametrize("number", NUMBERS)
def test_what_was_begun_is_cleaned_up_and_what_does_not_end_is_ended(number, tmp_path):
    for more in ([], ["taken"]):
        began = time.monotonic()
        program = [sys.executable, "-c", WORK, str(int(number)), str(tmp_path / "file"), *more]
        ended = subprocess.run(program, capture_output=True, text=True, timeout=20, check=False)
        assert (ended.returncode, ended.stderr) == (128 + number, "")
        assert time.monotonic() - began < 10
        if not more:
            assert list(tmp_path.iterdir()) == []


CLEANING_UP = """
import atexit, os, signal, sys
from salt_distill.common.termination import ended_by_signals
atexit.register(print, "ended", flush=True)  # as Ray cleans up at the end of a process
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
with ended_by_signals():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleaned up", flush=True)
"""


def test_a_second_signal_does_not_interrupt_the_cleaning_up():
    ended = subprocess.run(
        [sys.executable, "-c", CLEANING_UP], capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGINT, "cleaned up\nended\n", "")


def folders_of(pids: set[int]) -> list[Path]:
    """Those of the private Rays among some processes."""
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in alive(pids)]
    return [Path(line[-2].decode()) for line in lines if line[-3:-2] == [private_ray.__name__.encode()]]


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_at_every_moment_of_its_start(command, number, shards, tmp_path):
    ckpt, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
    (tmp_path / "sweep.yaml").write_text(
        f"common: {{data: {shards}, teacher_ckpt: {ckpt}, preset: nano, steps: 400, batch_size: 6}}\n"
        "runs: {a: {}}\n"
    )
    places = {"TEACHER": ckpt, "SHARDS": shards, "OUT": out, "SWEEP": tmp_path / "sweep.yaml"}
    program, line = COMMANDS[command]
    line = re.sub(r"\b[A-Z]+\b", lambda found: str(places.get(found.group(), found.group())), line)
    arguments = [part for word in line.split() for part in (SMALL if word == "SMALL" else [word])]
    for moment_s in (0.5, 1.5, 3, 5, 8, 12):
        process = begin(program, *arguments)
        time.sleep(moment_s)
        family = descendants(process.pid)
        folders = folders_of(family)
        process.send_signal(number)
        began = time.monotonic()
        out_text, said = process.communicate(timeout=60)
        took_s = time.monotonic() - began
        print(f"{command}, {number.name} after {moment_s} s: ended {took_s:.1f} s later")
        assert "Traceback" not in out_text + said
        assert took_s < 20
        # A teacher that is told to end has done what it was to do.
        assert process.returncode in (*CODES[number], *([0] if command == "teacher" else [])), said
        while alive(family) and time.monotonic() < began + 60:
            time.sleep(0.2)
        assert not alive(family)
        assert not [folder for folder in folders if folder.exists()]
        subprocess.run(["rm", "-rf", str(out)], check=True)
