"""Every flag of every command: it changes the configuration that it names, or the command is refused."""

import inspect
import re
import sys
import tomllib
import typing
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import typer
import yaml
from command_tools import salt

import salt_distill.common.data.making.cli as data
import salt_distill.common.plan.cli as plan
import salt_distill.student_trainer.cli as train
import salt_distill.student_trainer.evaluation.cli as evaluate
import salt_distill.teacher_server.cli as serve
from salt_distill.common.command import load, run_app
from salt_distill.common.config import (
    MASKS,
    CacheGcConfig,
    CacheStatsConfig,
    CacheVerifyConfig,
    Config,
    DrainConfig,
    EmbedConfig,
    ExportConfig,
    FidelityConfig,
    FlopsConfig,
    InspectConfig,
    MixConfig,
    PackConfig,
    PhysicsConfig,
    PicturesConfig,
    PlanConfig,
    PrecomputeConfig,
    PredictConfig,
    PretextConfig,
    ProbeConfig,
    RankConfig,
    ReportConfig,
    RunsConfig,
    ScenesConfig,
    SelectConfig,
    ServeConfig,
    SimilarConfig,
    StatusConfig,
    StudentRun,
    SweepConfig,
    SynthConfig,
    TableConfig,
    TeacherRun,
    VJepaRun,
)
from salt_distill.common.config.base import parse_yaml
from salt_distill.common.config.layers import is_nested
from salt_distill.common.extras import EXTRAS

APPS = {
    "salt-data": data.app,
    "salt-serve": serve.app,
    "salt-train": train.app,
    "salt-eval": evaluate.app,
    "salt-plan": plan.app,
}
RUN = {"data": "shards", "out": "run"}
COMMANDS: dict[str, tuple[type[Config], dict[str, str]]] = {
    "salt-data synth": (SynthConfig, {"out": "videos"}),
    "salt-data scenes": (ScenesConfig, {"out": "scenes"}),
    "salt-data pretext": (PretextConfig, {"src": "videos", "out": "clips"}),
    "salt-data pack": (PackConfig, {"src": "videos", "out": "shards"}),
    "salt-data mix": (MixConfig, {"recipe": "recipe.yaml", "out": "mixture"}),
    "salt-data inspect": (InspectConfig, {"data": "shards"}),
    "salt-serve teacher": (ServeConfig, {"ckpt": "run"}),
    "salt-serve precompute": (
        PrecomputeConfig,
        {"ckpt": "run", "data": "shards", "out": "targets", "views": "4"},
    ),
    "salt-serve cache verify": (CacheVerifyConfig, {"targets": "targets"}),
    "salt-serve cache stats": (CacheStatsConfig, {"targets": "targets"}),
    "salt-serve cache gc": (CacheGcConfig, {"targets": "targets"}),
    "salt-serve status": (StatusConfig, {"url": "http://127.0.0.1:1"}),
    "salt-serve runs": (RunsConfig, {"url": "http://127.0.0.1:1"}),
    "salt-serve drain": (DrainConfig, {"url": "http://127.0.0.1:1"}),
    "salt-serve stop": (DrainConfig, {"url": "http://127.0.0.1:1"}),
    "salt-train teacher": (TeacherRun, RUN),
    "salt-train student": (StudentRun, RUN | {"teacher_ckpt": "run"}),
    "salt-train vjepa": (VJepaRun, RUN),
    "salt-train sweep": (SweepConfig, {"file": "sweep.yaml", "out": "sweep"}),
    "salt-eval pictures": (PicturesConfig, {"ckpt": "run", "data": "shards", "out": "pictures"}),
    "salt-eval probe": (ProbeConfig, {"ckpt": "run", "data": "shards", "out": "probe.json"}),
    "salt-eval predict": (
        PredictConfig,
        {"probe": "probe.safetensors", "videos": "videos", "out": "predictions.csv"},
    ),
    "salt-eval embed": (EmbedConfig, {"ckpt": "run", "videos": "videos", "out": "features.parquet"}),
    "salt-eval similar": (
        SimilarConfig,
        {"features": "features.parquet", "query": "cat.mp4", "out": "similar.csv"},
    ),
    "salt-eval physics": (PhysicsConfig, {"ckpt": "run", "data": "scenes", "out": "physics.json"}),
    "salt-eval rank": (RankConfig, {"ckpt": "run", "data": "shards", "out": "rank.json"}),
    "salt-eval select": (
        SelectConfig,
        {"run_dirs": "run", "teacher": "teacher", "data": "shards", "out": "select.json"},
    ),
    "salt-eval flops": (FlopsConfig, {}),
    "salt-eval fidelity": (FidelityConfig, {}),
    "salt-eval export": (ExportConfig, {"ckpt": "run", "format": "hf", "out": "exported"}),
    "salt-eval table": (TableConfig, {"run_dirs": "run"}),
    "salt-eval report": (ReportConfig, {"run_dirs": "run", "out": "page.html"}),
    "salt-plan": (
        PlanConfig,
        {"student": "vit-l,clips_per_s=50", "teacher_clips_per_s": "300", "samples": "9000"}
        | {"link_gbps": "25", "decode_clips_per_s": "400", "disk_gb_per_s": "7"},
    ),
}
"""Each command with the fewest values that it accepts."""
OTHER = {
    "size": "96",
    "sheet": "other.png",
    "num_frames": "18",
    "views": "3",
    "preset": "nano",
    "mask": "random-tube",
    "teacher": "vit-h",
    "images": "each",
    "fps": "7",
    "replicas": "1:60",
    "gpu": "a100",
    "mfu": "0.5",
    "student": "vit-h,runs=3,clips_per_s=20",
    "lr": "7",
    "weight_decay": "7",
    "context": "4",
    "probe": "k400=probe.json",
    "val_every": "20",
}
"""Values of fields for which a made-up one would not do."""
TYPERS_OWN = {"install_completion", "show_completion"}
REFUSED = {
    ("salt-data pack", "copies"),  # without --short-side
    ("salt-eval embed", "stride"),  # without --window
    ("salt-eval select", "label"),  # without --probe
    ("salt-train student", "teacher_weight"),  # of one teacher
    ("salt-train student", "predict_from"),  # without --val-every
    ("salt-train student", "predict_label"),
    ("salt-train student", "on_teacher_loss"),  # without --teacher-url
    ("salt-train student", "masked_targets"),
    ("salt-train student", "group"),
    ("salt-train student", "teacher_token_file"),
    ("salt-train student", "teacher_ca"),
    ("salt-serve teacher", "host"),  # without --tokens
    ("salt-serve teacher", "tls_cert"),  # one without the other
    ("salt-serve teacher", "tls_key"),
    ("salt-train student", "cache"),
    ("salt-serve cache verify", "ckpt"),  # without --repair
    ("salt-serve cache verify", "data"),
    ("salt-train teacher", "estimate_out"),  # without --estimate
    ("salt-train student", "estimate_out"),
    ("salt-train vjepa", "estimate_out"),
    ("salt-train teacher", "gpu"),
    ("salt-train student", "gpu"),
    ("salt-train vjepa", "gpu"),
    *(
        (f"salt-train {run}", name)  # without --val-every
        for run in ("teacher", "student", "vjepa")
        for name in ("val_clips", "val_features", "stop_after_no_gain")
    ),
    ("salt-eval flops", "teacher_steps"),  # without --teacher
    ("salt-plan", "teacher_estimate"),  # a second speed
    ("salt-plan", "mfu"),  # without --gpu
}
"""Flags that mean nothing beside the fewest values alone."""


def click_command(command: str):
    app, *names = command.split()
    found = typer.main.get_command(APPS[app])
    for name in names:
        found = found.commands[name]  # type: ignore[attr-defined]
    return found


def commands_of(name: str, command) -> set[str]:
    """The commands of a group and of the groups in it."""
    if not hasattr(command, "commands"):
        return {name}
    return set().union(*(commands_of(f"{name} {child}", below) for child, below in command.commands.items()))


def arguments(command: str, values: dict[str, str | bool]) -> list[str]:
    """The command line that gives these values."""
    positional, flags = [], []
    for parameter in click_command(command).params:
        if parameter.name not in values:
            continue
        value = values[parameter.name]
        if parameter.param_type_name == "argument":
            positional.append(value)
        elif isinstance(value, bool):
            flags.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            flags += [parameter.opts[0], value]
    return [*positional, *flags]


def other_value(config_class: type[Config], name: str, value: object) -> str | bool:
    """Something that a field may be, and is not yet."""
    if name == "preset" and config_class is ProbeConfig:
        return "k400"
    if name == "out" and config_class is EmbedConfig:
        return "other.arrow"
    if name in OTHER:
        return OTHER[name]
    choices = typing.get_args(config_class.model_fields[name].annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return str(value / 2 or 0.5)
    annotation = str(config_class.model_fields[name].annotation) if name != "preset" else ""
    return "7" if "int" in annotation or "float" in annotation else "other"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line as a shell would: exit code, standard output, standard error."""

    def run(command: str, *more: str) -> tuple[int, str, str]:
        app, *names = command.split()
        monkeypatch.setattr(sys, "argv", [app, *names, *more])
        with pytest.raises(SystemExit) as stopped:
            run_app(APPS[app])
        out, error = capsys.readouterr()
        return int(stopped.value.code or 0), out, error

    return run


def test_no_command_is_left_out():
    assert set().union(
        *(commands_of(name, typer.main.get_command(app)) for name, app in APPS.items())
    ) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_changes_what_it_names(command, run):
    config_class, base = COMMANDS[command]
    code, printed, error = run(command, *arguments(command, base), "--print-config")
    assert (code, error) == (0, "")
    before = yaml.safe_load(printed)
    names = [parameter.name for parameter in click_command(command).params]
    fields = [name for name, field in config_class.model_fields.items() if not is_nested(field.annotation)]
    assert set(names) - {
        "config",
        "settings",
        "print_config",
        "help",
        "preset",
        "mask",
        "version",
    } - TYPERS_OWN == set(fields)
    for name in [*fields, *({"preset", "mask"} & set(names))]:
        value = other_value(config_class, name, before.get(name))
        code, printed, error = run(command, *arguments(command, base | {name: value}), "--print-config")
        if (command, name) in REFUSED:
            assert code == 2, name
            assert "--" + name.replace("_", "-") in error
            continue
        assert (code, error) == (0, ""), name
        changed = {key for key, now in yaml.safe_load(printed).items() if now != before[key]}
        preset = {"depth", "segments"} if config_class is ProbeConfig else {"encoder", "view"}
        assert changed == {name} if name != "preset" else preset <= changed, name


@pytest.mark.parametrize("command", COMMANDS)
def test_config_file_and_set_reach_every_field(command, run, tmp_path):
    config_class, base = COMMANDS[command]
    before = yaml.safe_load(run(command, *arguments(command, base), "--print-config")[1])
    for name, value in before.items():
        if isinstance(value, dict | list) or name in base or (command, name) in REFUSED:
            continue
        other = other_value(config_class, name, value)
        text = str(other).lower() if isinstance(other, bool) else other
        _, printed, error = run(
            command, *arguments(command, base), "--set", f"{name}={text}", "--print-config"
        )
        assert error == "", name
        assert {key for key, now in yaml.safe_load(printed).items() if now != before[key]} == {name}
        file = tmp_path / "config.yaml"
        file.write_text(f"{name}: {text}\n")
        assert (
            run(command, *arguments(command, base), "--config", str(file), "--print-config")[1] == printed
        ), name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_field_is_named(command, run):
    config_class, base = COMMANDS[command]
    positional = [
        parameter.name
        for parameter in click_command(command).params
        if parameter.param_type_name == "argument"
    ]
    for name in base:
        if not config_class.model_fields[name].is_required():
            continue
        code, _, error = run(
            command, *arguments(command, {key: value for key, value in base.items() if key != name})
        )
        assert code == 2, name
        # The arguments that are left move up.
        missing = positional[-1].upper() if name in positional else "--" + name.replace("_", "-")
        assert f"error: {missing} is required" in error


def test_student_without_a_source_of_targets_is_refused(run):
    code, _, error = run("salt-train student", *arguments("salt-train student", RUN))
    assert code == 2
    assert (
        "got no source of targets, expected one for each teacher: --teacher-url, --targets or --teacher-ckpt"
        in error
    )


def test_a_reserve_needs_a_service_and_a_checkpoint(run):
    local = ["--on-teacher-loss", "local", *arguments("salt-train student", RUN)]
    url, ckpt = ["--teacher-url", "http://127.0.0.1:1"], ["--teacher-ckpt", "run"]
    for source in (url, ckpt, [*url, *ckpt, "--targets", "targets"]):
        code, _, error = run("salt-train student", *local, *source, "--print-config")
        assert code == 2
        assert "expected --teacher-url, and --teacher-ckpt as the reserve" in error
    assert run("salt-train student", *local, *url, *ckpt, "--print-config")[0] == 0


def test_report_without_runs_is_refused(run):
    code, _, error = run("salt-eval report", "--out", "page.html")
    assert (code, error) == (2, "error: got no runs, expected run directories, or --runs FOLDER\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_known_is_refused(command, run, tmp_path):
    base = arguments(command, COMMANDS[command][1])
    code, _, error = run(command, *base, "--no-such-flag", "1")
    assert code == 2
    assert "--no-such-flag" in error
    code, _, error = run(command, *base, "--set", "no_such.key=1")
    assert code == 2
    assert error.startswith("error: --set: got the unknown key 'no_such.key'")
    code, _, error = run(command, *base, "--set", "steps")
    assert code == 2
    assert "expected KEY=VALUE" in error
    (tmp_path / "config.yaml").write_text("no_such: 1\n")
    code, _, error = run(command, *base, "--config", str(tmp_path / "config.yaml"))
    assert code == 2
    assert error.startswith(
        f"error: {tmp_path / 'config.yaml'}, line 1: no_such: unknown key, expected one of "
    )


def test_set_reaches_nested_keys_and_wins_over_file_and_preset(run, tmp_path):
    (tmp_path / "config.yaml").write_text("optim: {lr: 0.5, eps: 0.25}\nsteps: 77\n")
    base = arguments(
        "salt-train teacher", RUN | {"preset": "nano", "config": str(tmp_path / "config.yaml"), "steps": "99"}
    )
    _, printed, error = run(
        "salt-train teacher",
        *base,
        "--set",
        "optim.lr=1e-3",
        "--set",
        "view.scale=[0.5, 0.9]",
        "--print-config",
    )
    assert error == ""
    config = yaml.safe_load(printed)
    assert (config["optim"]["lr"], config["optim"]["eps"], config["steps"]) == (1e-3, 0.25, 99)
    assert (config["view"]["scale"], config["view"]["crop_size"]) == ([0.5, 0.9], 32)


def test_set_takes_a_number_for_the_text_that_a_field_is(run):
    _, printed, error = run(
        "salt-train teacher",
        *arguments("salt-train teacher", RUN),
        "--set",
        "out=7",
        "--set",
        "optim.lr=1e-3",
        "--print-config",
    )
    assert (yaml.safe_load(printed)["out"], yaml.safe_load(printed)["optim"]["lr"]) == ("7", 1e-3), error


def test_a_mask_wins_over_the_preset_and_loses_to_the_file(run, tmp_path):
    (tmp_path / "config.yaml").write_text("mask: {sets: [{hidden_fraction: 0.5}]}\n")
    base = arguments("salt-train teacher", RUN | {"preset": "nano", "mask": "multi-random-tube"})
    printed = yaml.safe_load(
        run("salt-train teacher", *base, "--set", "mask.truncate=random", "--print-config")[1]
    )
    assert printed["mask"] == {
        "sets": [{"hidden_fraction": 0.766}, {"hidden_fraction": 0.934}],
        "truncate": "random",
    }
    printed = yaml.safe_load(
        run("salt-train teacher", *base, "--config", str(tmp_path / "config.yaml"), "--print-config")[1]
    )
    assert printed["mask"]["sets"] == [{"hidden_fraction": 0.5}]
    both = run(
        "salt-train teacher",
        *base,
        "--set",
        "mask.sets=[{hidden_fraction: 0.5, num_blocks: 3}]",
        "--print-config",
    )
    assert both[0] == 2
    assert "--set mask.sets: mask.sets.0.num_blocks: unknown key" in both[2]


def test_a_misspelt_key_and_preset_get_a_hint(run):
    base = arguments("salt-train teacher", RUN)
    assert "did you mean 'optim.lr'?" in run("salt-train teacher", *base, "--set", "optim.l=1")[2]
    assert (
        "got preset 'vit-x', expected one of vit-b,"
        in run("salt-train teacher", *base, "--preset", "vit-x")[2]
    )
    assert (
        "got mask 'cube', expected one of multi-block, causal-multi-block,"
        in run("salt-train teacher", *base, "--mask", "cube")[2]
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag(command):
    for parameter in click_command(command).params:
        assert getattr(parameter, "help", None) or parameter.name == "help", parameter.name


def test_aliases_of_aliases_are_refused_and_plain_ones_are_not():
    assert parse_yaml("a: &it [1, 2]\nb: *it") == {"a": [1, 2], "b": [1, 2]}
    bomb = "a: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
        f"b{level}: &a{level + 1} [{', '.join([f'*a{level}'] * 10)}]\n" for level in range(30)
    )
    for text in (bomb, "a: &a [*a]", "[" * 20_000):
        with pytest.raises(yaml.YAMLError, match=r"aliases|nested"):
            parse_yaml(text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("steps: ten\n", "1: steps: got 'ten', expected a whole number (as a flag: --steps)"),
        ("optim:\n  lr: a\n", "2: optim.lr: got 'a', expected a number (as a flag: --set optim.lr=...)"),
        ("optim.lr: -1\n", "1: optim.lr: got -1, expected more than 0 (as a flag: --set optim.lr=...)"),
        (
            "views: []\n",
            "1: views: got [], expected fresh, or a whole number more than 0 (as a flag: --views)",
        ),
        ("seed: 1\nlr: 1\n", "2: lr: unknown key, did you mean 'optim.lr'?"),
        ("stepps: 1\n", "1: stepps: unknown key, did you mean 'steps'?"),
        ("seed: 1\nvew.num_frames: 8\n", "2: vew: unknown key, did you mean 'view'?"),
        (
            "view: {scale: 1}\n",
            "1: view.scale: got 1, expected a list of 2 numbers more than 0, such as [0.3, 1.0]"
            " (as a flag: --set view.scale=...)",
        ),
        ("seed: [1\n", "2: got no YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)  # fmt: skip
def test_an_error_of_a_file_names_line_key_and_flag(content, expected, run, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    base = arguments("salt-train teacher", RUN)
    code, _, error = run("salt-train teacher", *base, "--config", str(tmp_path / "run.yaml"))
    assert (bool(code), error) == (True, f"error: {tmp_path / 'run.yaml'}, line {expected}\n")


@pytest.mark.parametrize(
    "line",
    [
        "salt-train teacher --data shards --out run --config FILE",
        "salt-train sweep FILE --out sweep --teacher-url http://127.0.0.1:1",
        "salt-data mix FILE mixture",
        "salt-plan --student vit-l,clips_per_s=9 --samples 9 --link-gbps 25 --decode-clips-per-s 9"
        " --disk-gb-per-s 7 --teacher-estimate FILE",
    ],
)
def test_a_file_that_is_no_utf8_is_named_with_its_line(line, run, tmp_path):
    path = tmp_path / "latin-1"
    path.write_bytes("steps: 3\n# caf\u00e9\n".encode("latin-1"))
    app, *words = line.replace("FILE", str(path)).split()
    names = 0 if app == "salt-plan" else 1
    code, _, error = run(" ".join([app, *words[:names]]), *words[names:])
    assert code
    assert f"{path}, line 2: got the byte b'\\xe9', expected text in UTF-8" in error


def test_an_error_of_a_flag_names_it(run):
    base = arguments("salt-train teacher", RUN)
    code, _, error = run("salt-train teacher", *base, "--steps", "ten", "--set", "optim.lr=fast")
    assert (code, error.splitlines()) == (
        2,
        [
            "error: --steps: got 'ten', expected a whole number",
            "--set optim.lr: got 'fast', expected a number",
        ],
    )
    code, _, error = run("salt-train teacher", *base, "--config", "nowhere.yaml")
    assert (code, error) == (1, "error: nowhere.yaml: No such file or directory\n")


def test_a_file_may_hold_a_preset_a_mask_by_name_and_dotted_keys(run, tmp_path):
    (tmp_path / "run.yaml").write_text("preset: nano\nmask: random-tube\noptim.lr: 1e-2\noptim: {eps: 0.5}\n")
    printed = yaml.safe_load(
        run("salt-train", "teacher", "--config", str(tmp_path / "run.yaml"), "--print-config")[1]
    )
    assert (printed["view"]["crop_size"], printed["optim"]["lr"], printed["optim"]["eps"]) == (32, 1e-2, 0.5)
    assert printed["mask"]["sets"] == MASKS["random-tube"]
    assert (printed["data"], printed["out"]) == ("DATA", "OUT")  # to be filled in


def test_version_and_completion(run):
    for app in APPS:
        code, printed, _ = run(app, "--version")
        assert (code, printed) == (0, f"salt-distill {version('salt-distill')}\n")
    for line, expected in {"salt-train te": "teacher", "salt-train teacher --preset na": "nano"}.items():
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        assert salt("salt-train", _SALT_TRAIN_COMPLETE="complete_bash", **words).stdout.split() == [expected]


def test_every_command_names_a_function_that_is_there():
    named = [
        name
        for app in (data, plan, train, evaluate, serve)
        for name in re.findall(r'"(salt_distill[\w.]+:\w+)"', inspect.getsource(app))
    ]
    assert len(named) == len(COMMANDS)
    for name in named:
        assert callable(load(name))


def test_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    packages = {"sklearn": "scikit-learn"}
    of_ray_train = re.findall(r"^([\w-]+)[^;]*; .*extra == \"train\"", "\n".join(requires("ray") or []), re.M)
    for extra, modules in EXTRAS.items():
        listed = [re.match(r"[\w-]+", package)[0] for package in project["optional-dependencies"][extra]]
        listed += of_ray_train if extra == "train" else []
        assert {packages.get(module, module) for module in modules} <= set(listed), extra


def test_a_missing_extra_is_said_before_any_work(run, monkeypatch, tmp_path):
    monkeypatch.setitem(EXTRAS, "serve", ("ray", "no_such_module"))
    code, _, error = run("salt-serve teacher", "--ckpt", str(tmp_path))
    assert (code, error) == (
        1,
        "error: got no no_such_module, expected what this command needs: pip install 'salt-distill[serve]'\n",
    )
