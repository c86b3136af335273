"""The command that makes a run, from its configuration: shorter than the configuration, and equal to it."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from salt_distill.common.config import (
    MASKS,
    PRESETS,
    ConfigValues,
    StudentRun,
    TeacherRun,
    TrainConfig,
    VJepaRun,
    load_yaml,
    mask_layer,
    preset_layer,
)
from salt_distill.common.config.layers import flag_of, keys_of, merge
from salt_distill.student_trainer.evaluation.finished_runs import objective_of

_KINDS: dict[str, type[TrainConfig]] = {"vpixel": TeacherRun, "salt": StudentRun, "vjepa": VJepaRun}
_COMMANDS = {"vpixel": "teacher", "salt": "student", "vjepa": "vjepa"}
_MASK_KEY = "mask.sets"


def command_of(run: Path) -> str:
    """`salt-train ...` that resolves to a run's configuration, with the preset that needs the fewest flags
    beside it. A run that another version made is named by its file."""
    values = load_yaml(run / "config.yaml")
    objective = objective_of(values)
    program = f"salt-train {_COMMANDS[objective]}"
    try:
        config = _KINDS[objective].model_validate(values)
    except ValidationError:
        return f"{program} --config {shlex.quote(str(run / 'config.yaml'))}"
    return shlex.join([*program.split(), *min((_flags(config, preset) for preset in PRESETS), key=len)])


def _flags(config: TrainConfig, preset: str) -> list[str]:
    """What makes ``config`` beside a preset. `--resume` is not of it: this makes the run from its start."""
    wanted = config.model_dump(mode="json")
    default = _default(type(config), preset)
    flags = ["--preset", preset]
    for key in keys_of(type(config)):
        value = _at(key, wanted)
        if key == "resume" or value == _at(key, default):
            continue
        flags += _mask(value) if key == _MASK_KEY else _flag(key, value)
    return flags


def _default(config_class: type[TrainConfig], preset: str) -> ConfigValues:
    """Everything that a preset leaves where nobody types anything, as JSON has it."""
    required = {name: None for name, field in config_class.model_fields.items() if field.is_required()}
    layer = preset_layer(config_class, preset)
    below = {
        name: field.get_default(call_default_factory=True)
        for name, field in config_class.model_fields.items()
        if not field.is_required()
    }
    plain = config_class.model_construct(**below).model_dump(mode="json", exclude=set(required))
    return merge(required, plain, json.loads(json.dumps(layer)))


def _mask(sets: Any) -> list[str]:
    for name in MASKS:
        if json.loads(json.dumps(mask_layer(name)))["mask"]["sets"] == sets:
            return ["--mask", name]
    return ["--set", f"{_MASK_KEY}={json.dumps(sets)}"]


def _flag(key: str, value: Any) -> Iterator[str]:
    if "." in key or value is None or isinstance(value, list | dict):
        yield from ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    elif isinstance(value, bool):
        yield flag_of(key) if value else f"--no-{flag_of(key)[2:]}"
    else:
        yield from (flag_of(key), str(value))


def _at(key: str, values: Any) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
