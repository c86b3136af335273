"""The steps of ``deploy/Dockerfile``, run in order without an engine: each stage is a folder that debootstrap
filled, each RUN a chroot.

It knows the instructions that the file has, and refuses others. What is built is then used as its user: the
commands start, a small teacher trains. Run it as root: ``python tests/image/build.py FOLDER``, with 20 GB
free in FOLDER, which is removed. Exit status 77: it cannot run here, and says why.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CANNOT = 77
SUITE, PYTHON = "bookworm", "python:3.11-slim-bookworm"
"""Debian's release with the Python of the image that the file names."""
FROM_HERE = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/pip.conf",
    "/etc/ssl/certs/ca-certificates.crt",
    "/usr/local/share/ca-certificates",
    "/etc/apt",
)
"""How this machine reaches its registries, as an engine would hand it to a build."""


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, in order: name and the rest."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines.splitlines() if line)]


def run_in(
    root: Path, command: str, environment: dict[str, str], *, folder: str = "/", user: str = "0"
) -> None:
    variables = [f"{name}={value}" for name, value in environment.items()]
    where = f"cd {shlex.quote(folder)} && {command}"
    subprocess.run(
        ["chroot", f"--userspec={user}:{user}", root, "env", "-i", *variables, "/bin/sh", "-c", where],
        check=True,
    )


def new_root(base: Path, to: Path) -> Path:
    """A copy of what debootstrap made, which is made the first time."""
    if not base.exists():
        mirror = next(
            iter(
                re.findall(
                    r"^(?:URIs: |deb )(\S+/debian/?)", "\n".join(p.read_text() for p in _sources()), re.M
                )
            ),
            "",
        )
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, SUITE, base, *([mirror] if mirror else [])],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for name in FROM_HERE:
            if Path(name).is_dir():
                shutil.copytree(name, base / name[1:], dirs_exist_ok=True)
            elif Path(name).exists():
                shutil.copy(name, base / name[1:])
        (base / "usr/local/bin/python3").symlink_to("/usr/bin/python3")
    subprocess.run(["cp", "-a", base, to], check=True)
    return to


def _sources() -> list[Path]:
    return [
        path
        for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*"))
        if path.is_file()
    ]


def copy(words: list[str], stages: dict[str, Path], root: Path, where: str) -> None:
    """COPY: from the project, or from another stage."""
    source = ROOT
    if words[0].startswith("--from="):
        source = stages[words.pop(0).removeprefix("--from=")]
    *names, to = words
    target = root / (Path(where) / to).relative_to("/")
    for name in names:
        origin = source / name.lstrip("/")
        if origin.is_dir():
            left_out = shutil.ignore_patterns("__pycache__") if source == ROOT else None
            shutil.copytree(origin, target, symlinks=True, dirs_exist_ok=True, ignore=left_out)
        else:
            shutil.copy(origin, target / origin.name if to.endswith("/") else target)


def build(folder: Path) -> tuple[Path, dict[str, str], str, str]:
    """The root of the last stage, its environment, user and working directory."""
    stages: dict[str, Path] = {}
    arguments = {
        name: value for name, value in os.environ.items() if name in ("PIP_CERT", "http_proxy", "https_proxy")
    }
    root, environment, user, where = folder, dict[str, str](), "0", "/"
    for name, rest in instructions((ROOT / "deploy" / "Dockerfile").read_text()):
        started = time.monotonic()
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            assert base == PYTHON, f"{base} is not {PYTHON}, which debootstrap stands in for"
            root = new_root(folder / "base", folder / f"stage-{len(stages)}")
            stages[stage or str(len(stages))] = root
            environment, user, where = (
                {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
                "0",
                "/",
            )
        elif name == "ARG":
            key, _, value = rest.partition("=")
            environment[key] = value.strip('"')
        elif name == "ENV":
            for pair in shlex.split(rest):
                key, _, value = pair.partition("=")
                environment[key] = value.replace("$PATH", environment["PATH"])
        elif name == "WORKDIR":
            where = rest
            (root / rest[1:]).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            user, environment["HOME"] = rest, "/home/salt"
        elif name == "COPY":
            copy(rest.split(), stages, root, where)
        elif name == "RUN":
            run_in(root, rest, environment | arguments, folder=where, user=user)
        else:
            assert name == "CMD", f"{name} is not known here"
        print(f"{name} {rest[:90]}: {time.monotonic() - started:.0f} s", flush=True)
    return root, environment, user, where


def main(folder: Path) -> int:
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        print("it needs root, and Debian's package debootstrap")
        return CANNOT
    folder.mkdir()
    try:
        root, environment, user, where = build(folder)
        (root / "dev/shm").mkdir(exist_ok=True)
        (root / "dev/shm").chmod(0o1777)
        for command in (
            "id -u",
            "salt-serve --help > /dev/null && salt-eval --help > /dev/null && ray --version",
            (
                "salt-data synth videos --num-train 24 --num-test 8 > /dev/null && salt-data pack videos"
                " shards > /dev/null"
            ),
            (
                "salt-train teacher --preset nano --data shards --out teacher --steps 3 --batch-size 8"
                " --workers 0 --set optim.warmup_steps=1"
            ),
        ):
            run_in(root, command, environment, folder=where, user=user)
        own, base = (
            int(
                subprocess.run(
                    ["du", "-sm", path], check=True, capture_output=True, text=True
                ).stdout.split()[0]
            )
            for path in (root, folder / "base")
        )
        print(f"the image has {own} MB, {own - base} of them on top of the base")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
