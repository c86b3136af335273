"""Without the optional packages: who needs one says so before any work, and everybody else works."""

import json
import subprocess
import sys

import pytest
from command_tools import SMALL
from test_commands import COMMANDS

from salt_distill.common.extras import EXTRAS

RUN = "--data shards --out run"
PLAN = "--student vit-l,runs=4,gpus=8 --gpu h100 --link-gbps 100 --decode-clips-per-s 416 --disk-gb-per-s 7"
NEEDS = {
    "salt-serve teacher --ckpt run": "serve",
    "salt-serve precompute --ckpt run --data shards --views 2 --out targets --workers 1": "serve",
    f"salt-train teacher {RUN} --preset nano --workers 1": "train",
    f"salt-train teacher {RUN} --preset nano --workers 0 --metrics-port 9999": "train",
    f"salt-train teacher {RUN} --preset nano --workers 0 --wandb salt": "wandb",
    f"salt-train student {RUN} --preset nano --teacher-ckpt run --workers 1": "train",
    f"salt-train vjepa {RUN} --preset nano --workers 1": "train",
    "salt-train sweep sweep.yaml --out sweep": "train",
    "salt-eval embed videos --ckpt run --out features.parquet --workers 1": "train",
    "salt-eval probe --ckpt run --data shards --out probe.json": "eval",
    "salt-eval pictures --ckpt run --data shards --out pictures": "eval",
    "salt-eval select run --teacher run --data shards --out select.json": "eval",
    "salt-eval report run --out page.html": "eval",
    "salt-data synth videos": "eval",
    f"salt-plan {PLAN} --chart plan.png": "eval",
}
"""Command lines, and the extra without which each is refused."""

WITHOUT = """
import importlib, json, os, re, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name in {modules} else find(name, *more)
from salt_distill.common.command import load
from salt_distill.common.plan import cli as plan
from salt_distill.common.data.making import cli as data
from salt_distill.student_trainer import cli as train
from salt_distill.student_trainer.evaluation import cli as evaluate
from salt_distill.teacher_server import cli as serve
clis = {{"salt-data": data, "salt-train": train, "salt-eval": evaluate}}
clis |= {{"salt-serve": serve, "salt-plan": plan}}

def run(line):
    program, *arguments = line
    clis[program].app(arguments, standalone_mode=False)
"""
HIDDEN = sorted({module for modules in EXTRAS.values() for module in modules})


def in_process_without(code: str, folder, *arguments: object) -> str:
    """What a program says that runs where no optional package is installed."""
    program = WITHOUT.format(modules=HIDDEN) + code
    done = subprocess.run(
        [sys.executable, "-c", program, *map(json.dumps, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


REFUSED = """
for line in json.loads(sys.argv[1]):
    try:
        run(line.split())
        print("done")
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
for cli in clis.values():
    for name in re.findall(r'"(salt_distill[\\w.]+:\\w+)"', open(cli.__file__).read()):
        try:
            load(name)
        except ModuleNotFoundError as error:
            print(f"{name} needs {error.name}")
print(os.listdir("."))
"""


def test_who_needs_an_optional_package_says_so_before_any_work(tmp_path):
    lines = in_process_without(REFUSED, tmp_path, list(NEEDS)).splitlines()
    for (command, extra), said in zip(NEEDS.items(), lines, strict=False):
        sentence = f"expected what this command needs: pip install 'salt-distill[{extra}]'"
        assert said.startswith("ValueError: got no "), (command, said)
        assert said.endswith(sentence), (command, said)
    assert lines[-1] == "[]"
    needing = {line.partition(" ")[0] for line in lines[len(NEEDS) : -1]}
    assert needing <= {
        "salt_distill.teacher_server.app:serve_teacher",
        "salt_distill.student_trainer.sweep.run:run",
        "salt_distill.student_trainer.evaluation.select:run",
        "salt_distill.student_trainer.evaluation.report.build:run",
    }, lines[len(NEEDS) :]
    assert {" ".join(command.split()[:2]).partition(" --")[0] for command in NEEDS} <= set(COMMANDS)


@pytest.mark.slow
def test_everything_else_works_without_them(synth_videos, tmp_path):
    small = [*SMALL, "--steps", "2", "--batch-size", "6", "--set", "optim.warmup_steps=1", "--workers", "0"]
    lines = [
        f"salt-data pack {synth_videos} shards --workers 1",
        "salt-data inspect shards",
        " ".join(["salt-train teacher --data shards --out run", *small]),
        "salt-serve precompute --ckpt run --data shards --views 2 --out targets --workers 0",
        "salt-serve cache verify targets",
        "salt-serve cache stats targets",
        " ".join(["salt-train student --data shards --out cached --targets targets", *small]),
        " ".join(["salt-train vjepa --data shards --out vjepa", *small]),
        f"salt-eval embed {synth_videos} --ckpt run --out features.parquet",
        "salt-eval export --ckpt run --out exported --format hf",
        "salt-eval flops",
        f"salt-plan {PLAN}",
    ]
    code = "for line in json.loads(sys.argv[1]):\n    run(line.split())\n    print('did', line)\n"
    said = in_process_without(code, tmp_path, lines)
    assert said.count("did salt-") == len(lines)
