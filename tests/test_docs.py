"""Whatever a page of the documentation says in code: each command line is read by the command itself, each
flag, key and file exists, each block of Python runs, each link leads somewhere."""

import contextlib
import io
import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
import yaml
from pages import PAGES, ROOT, Block, anchors, blocks, command_lines, links, prose, spans, text_of

import salt_distill.common.data.making.cli as data
import salt_distill.common.plan.cli as plan
import salt_distill.student_trainer.cli as train
import salt_distill.student_trainer.evaluation.cli as evaluate
import salt_distill.teacher_server.cli as serve
from salt_distill.common import config
from salt_distill.common.command import UsageError
from salt_distill.common.config import (
    Config,
    MixRecipe,
    StudentRun,
    SweepFile,
    TeacherRun,
    TokenConfig,
    VJepaRun,
)
from salt_distill.common.config.layers import keys_of, nested

PROGRAMS = {
    "salt-data": data.app,
    "salt-serve": serve.app,
    "salt-train": train.app,
    "salt-eval": evaluate.app,
    "salt-plan": plan.app,
}
OTHERS_PROGRAMS = {
    "pip",
    "cp",
    "git",
    "docker",
    "kubectl",
    "ray",
    "curl",
    "grep",
    "cd",
    ".",
    "$EDITOR",
    "sbatch",
    "scontrol",
}
"""What else a block may run; nothing checks how."""
HISTORY = "CHANGELOG.md"
"""It tells of flags and files that were."""
TOOLS = {"python", "bash", "make"}
LANGUAGES = {"bash", "python", "yaml", "json", "text"}
RUN_BY = {
    "docs/python.md": "tests/test_wheel.py",
    "docs/protocol.md": "tests/test_client_targets.py",
    "docs/cache-layout.md": "tests/test_targets_cache.py",
}
"""Tests that run a page's blocks of Python with what those need, in place of this one."""
CONFIGS: dict[str, Callable[[dict], object]] = {
    "docs/data.md": MixRecipe.model_validate,
    "docs/students.md": SweepFile.model_validate,
    "docs/service.md": lambda loaded: [TokenConfig.model_validate(each) for each in loaded.values()],
}
"""What reads the blocks of YAML of a page; elsewhere they are files for ``--config`` of a training run."""
NOW = [page for page in PAGES if page != HISTORY]


@cache
def program(name: str):
    return typer.main.get_command(PROGRAMS[name])


def flags_of(command) -> set[str]:
    below = getattr(command, "commands", {}).values()
    own = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
    return own.union(*(flags_of(each) for each in below)) | {"--help"}


@cache
def every_flag() -> set[str]:
    return set().union(*(flags_of(program(name)) for name in PROGRAMS))


def config_classes() -> list[type[Config]]:
    found = [getattr(config, name) for name in config.__all__]
    return [each for each in found if isinstance(each, type) and issubclass(each, Config)]


@cache
def every_key() -> set[str]:
    return {key for each in config_classes() for key in keys_of(each)}


def read_by_command(words: list[str]) -> str | None:
    """What the command itself says against a command line, or None; its files need not be there."""
    short = "..." in words
    words = [word for word in words if word != "..."]
    if "--config" in words and not (ROOT / words[words.index("--config") + 1]).exists():
        position = words.index("--config")
        del words[position : position + 2]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            program(words[0])([*words[1:], "--print-config"], standalone_mode=False, prog_name=words[0])
    except UsageError as error:
        return None if short and "is required" in str(error) else str(error)
    except Exception as error:  # noqa: BLE001 - typer's own, which it does not export
        return f"{type(error).__name__}: {error}"
    return None


def wrong_in_prose(words: list[str]) -> str | None:
    """The first flag or name in a command that is no part of it."""
    command = program(words[0])
    for word in words[1:]:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
        elif hasattr(command, "commands") and re.fullmatch(r"[a-z-]+", word) and not word.startswith("-"):
            return f"{word!r} is no command"
        elif (
            word.startswith("-")
            and not word.lstrip("-").isdecimal()
            and word.split("=")[0] not in flags_of(command)
        ):
            return f"{word!r} is no flag of it"
    return None


def wrong_otherwise(words: list[str]) -> str | None:
    """What is wrong with a command that is not ours."""
    name, *rest = words
    if name == "make":
        targets = re.findall(r"^([\w./-]+|\$\(STAMP\)):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in rest if word not in [*targets, ".venv/.installed"] and "=" not in word]
        return f"make has no {unknown[0]}" if unknown else None
    if name in ("python", "bash"):
        if rest[:2] == ["-m", "pytest"]:
            return next(
                (f"no {word}" for word in rest[2:] if "/" in word and not (ROOT / word).exists()), None
            )
        if rest[0] == "-m":
            rest = [rest[1].replace(".", "/"), *rest[2:]]
            rest[0] += "/__main__.py" if (ROOT / rest[0]).is_dir() else ".py"
        name, *rest = rest
    if name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [
            extra
            for word in rest
            for found in re.findall(r"\[([\w,]+)\]", word)
            for extra in found.split(",")
        ]
        unknown = [extra for extra in named if extra not in extras]
        return f"no extra {unknown[0]}" if unknown else None
    if name in OTHERS_PROGRAMS:
        return None
    if not (ROOT / name).is_file():
        return f"got {name}, expected a program of ours, a file of the repository or one of {OTHERS_PROGRAMS}"
    source = "".join(
        path.read_text() for path in (ROOT / name).parent.glob("*.*") if path.suffix in (".py", ".sh")
    )
    flags = [word.split("=")[0] for word in rest if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in source and flag[2:].replace("-", "_") not in source]
    return f"{name} knows no {unknown[0]}" if unknown else None


def wrong_with(words: list[str], *, whole: bool) -> str | None:
    if words[0] in PROGRAMS:
        return read_by_command(words) if whole else wrong_in_prose(words)
    return wrong_otherwise(words)


@pytest.mark.parametrize("page", NOW)
def test_every_block_says_its_language(page):
    assert [(each.place, each.language) for each in blocks(page) if each.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", NOW)
def test_every_command_line_of_a_block_means_something(page):
    wrong = [
        f"{block.place}: {' '.join(words)}: {sentence}"
        for block in blocks(page, "bash")
        for words in command_lines(block.text)
        if (sentence := wrong_with(words, whole=True))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", NOW)
def test_every_command_flag_key_and_file_in_a_sentence_exists(page):
    wrong = [f"{page}: `{span}`: {sentence}" for span in spans(page) if (sentence := wrong_span(span, page))]
    assert not wrong, "\n".join(wrong)


def wrong_span(span: str, page: str) -> str | None:
    """What is wrong with code in a sentence, as far as it can be known."""
    first = span.split()[0]
    if first in PROGRAMS or (first in TOOLS and " " in span):
        commands = list(command_lines(span))
        return next((wrong for words in commands if (wrong := wrong_with(words, whole=False))), None)
    if re.match(r"--[a-z]", span):
        return None if re.match(r"--[\w-]+", span)[0] in flags_of_page(page) else "no command has this flag"
    groups = {key.split(".")[0] for key in every_key() if "." in key}
    key = re.fullmatch(r"(\w+(?:\.[a-z_0-9]+)+)(?:=.*)?", span)
    if key and key[1].split(".")[0] in groups and key[1] not in every_key() and not key[1].endswith(".py"):
        return "no configuration has this key"
    path = re.fullmatch(
        r"((?:common|teacher_server|student_trainer|salt_distill|deploy|docs|benchmarks|tests|recipes)/[\w./-]+)(?:::\w+)?",
        span,
    )
    if path and not (ROOT / path[1]).exists():
        return "no such file"
    return None


def flags_of_page(page: str) -> set[str]:
    """Ours, and those of the scripts that the page names."""
    scripts = [ROOT / path for path in re.findall(r"[\w/]+/\w+\.(?:py|sh)", text_of(page))]
    scripts += [path for path in (ROOT / "benchmarks").glob("*.*") if page.startswith("benchmarks/")]
    own = {
        flag for path in scripts if path.is_file() for flag in re.findall(r"--[a-z][\w-]+", path.read_text())
    }
    return every_flag() | own


@pytest.mark.parametrize("page", NOW)
def test_every_block_of_yaml_is_read_by_what_it_is_for(page):
    for block in blocks(page, "yaml"):
        loaded = yaml.safe_load(block.text)
        if page in CONFIGS:
            CONFIGS[page](loaded)
        else:
            known = {key for each in (TeacherRun, StudentRun, VJepaRun) for key in keys_of(each)} | {
                "preset",
                "mask",
            }
            assert set(dotted(nested(loaded))) <= known, block.place


def dotted(values: dict) -> list[str]:
    below = [
        (key, dotted(value)) if isinstance(value, dict) else (key, [""]) for key, value in values.items()
    ]
    return [f"{key}.{each}".rstrip(".") for key, keys in below for each in keys]


def write_vit_big(folder: Path) -> None:
    torch.save({"encoder": {}}, folder / "vitG.pt")


def write_features(folder: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "features": [[0.5, 1.0]]}), folder / "features.parquet")


NEEDS: dict[str, Callable[[Path], None]] = {
    "docs/checkpoints.md": write_vit_big,
    "docs/evaluation.md": write_features,
}
"""What a page's blocks of Python find in their folder."""


@pytest.mark.parametrize("page", [page for page in NOW if blocks(page, "python")])
def test_every_block_of_python_runs(page, tmp_path, monkeypatch):
    if page in RUN_BY:
        assert Path(page).name in text_of(RUN_BY[page])
        return
    NEEDS[page](tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block.text, block.place, "exec"), {"torch": torch})


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in links(page):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{page}: {target}"


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(navigation) == len(set(navigation))
    assert {Path(page).name for page in PAGES if page.startswith("docs/")} <= set(navigation)


def test_a_wrong_flag_key_value_file_and_program_are_found():
    wrong = [
        "salt-train student --no-such-flag",
        "salt-train student --data S --out R --teacher-ckpt T --steps many",
        "salt-train teacher --data S --out R --set optim.no=1",
        "salt-train nothing",
        "make nothing",
        "python benchmarks/nothing.py",
        "python benchmarks/data.py --no-such-flag",
        "pip install 'salt-distill[nothing]'",
        "slat-train teacher",
    ]
    for line in wrong:
        [words] = command_lines(line)
        assert wrong_with(words, whole=True), line
    for span in (
        "--no-such-flag",
        "optim.no",
        "tests/nothing.py",
        "salt-eval nothing",
        "salt-eval embed --no",
    ):
        assert wrong_span(span, "README.md"), span
    assert wrong_span("salt-eval embed --ckpt X", "README.md") is None
    assert isinstance(Block("README.md", 1, "bash", "").place, str)
    assert "```" not in prose("README.md")
