"""Wrong values of every field of every configuration: a sentence of ours, never one of pydantic's."""

import datetime
import re
import typing

import pydantic
import pytest
import yaml
from pydantic_core.core_schema import ErrorType

import salt_distill.common.command  # noqa: F401 - with it all configuration classes
from salt_distill.common.config import Config, SweepConfig, TeacherRun, explain
from salt_distill.common.config.layers import Layer
from salt_distill.common.config.wrong_values import expected, shown
from salt_distill.student_trainer.sweep.sweep_file import runs_of

WRONG = [
    None, "x", "", 1, 1.5, -1, True, [], [1], ["a"], [1, 2, 3], {}, {"a": 1}, {1: 2}, [[1]], [{}], [None],
    float("nan"), float("inf"), 10**30, datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2), b"\xff",
    {"x"}, "x" * 10_000, [{"a": {"b": [1, {"c": 2}]}}],
]  # fmt: skip
IDIOM = re.compile(
    r"Input should|valid |unable to|Field required|not permitted|_type|_parsing|literal|tuple|NoneType|None\b"
    r"|True|False|\bdict|instance|https?:|Config\b|Error|function-|\\d|Annotated|datetime|\[type="
)
"""What pydantic and Python say, and people who write a YAML file do not."""


def classes(above: type[Config] = Config) -> list[type[Config]]:
    return [kind for child in above.__subclasses__() for kind in (child, *classes(child))]


@pytest.mark.parametrize(
    "kind", sorted(set(classes()), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__
)
def test_every_field_refuses_in_words_of_ours(kind):
    num_sentences = 0
    for name in kind.model_fields:
        for wrong in WRONG:
            values = {name: wrong}
            with pytest.raises(pydantic.ValidationError) as refused:
                kind.model_validate(values | {"no_such_key": 0})
            sentences = explain(refused.value, [Layer(values, lambda key: f"run.yaml, line 3: {key}")], kind)
            for sentence in sentences.splitlines():
                if f": {name}" not in sentence:
                    continue  # of what is required, or unknown
                num_sentences += 1
                assert not IDIOM.search(sentence), sentence
                assert kind.__name__ not in sentence
                assert len(sentence) < 400, sentence
                assert re.search(r"expected |is required|unknown key", sentence), sentence
    assert num_sentences >= len(kind.model_fields)


@pytest.mark.parametrize("kind", typing.get_args(ErrorType))
def test_every_kind_of_error_is_said(kind):
    numbers = {name: 3 for name in ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length")}
    context = {"expected": "'a' or 'b'", "pattern": "a+", **numbers}
    item = {"type": kind, "msg": "Value error, got a, expected b", "input": object(), "ctx": context}
    assert not IDIOM.search(expected(item))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("view.scale", [0.5], "[0.5], expected a list of 2 numbers more than 0, such as [0.3, 1.0]"),
        ("view.ratio", ["a", 1], "expected a list of 2 numbers more than 0, such as [0.75, 1.35]"),
        ("optim.betas", [1], "a list of 2 numbers of at least 0 and less than 1, such as [0.9, 0.95]"),
        ("compute.compile", "maybe", "got 'maybe', expected auto, or true or false"),
        ("views", 0, "got 0, expected fresh, or a whole number more than 0"),
        ("steps", "1e5", "got '1e5', expected a whole number: write 100000"),
        ("split", 7, "got 7, expected a text: put it in quotes"),
        ("wandb", "", "got '', expected a text that is not empty"),
        ("mask.sets", [{"num_blocks": 3}], "is required"),
        ("mask.sets", [{"blocks": 3}], "unknown key, did you mean 'num_blocks'?"),
    ],
)  # fmt: skip
def test_what_is_said(key, value, sentence):
    values: typing.Any = value
    for part in reversed(key.split(".")):
        values = {part: values}
    with pytest.raises(pydantic.ValidationError) as refused:
        TeacherRun.model_validate({"data": "d", "out": "o", "steps": 9000} | values)
    said = explain(refused.value, [Layer(values, str)], TeacherRun).splitlines()
    assert any(line.startswith(key) and line.endswith(sentence) for line in said), said
    assert len(said) == 1 or key == "mask.sets"


def test_values_are_shown_as_a_file_has_them():
    value = {"a": [None, True, 1.5, "b"], "c": datetime.date(2026, 1, 2)}
    assert shown(value) == "{a: [nothing, true, 1.5, 'b'], c: the date 2026-01-02}"
    assert len(shown("x" * 1000)) < 130


def test_an_error_of_a_sweep_names_the_line_of_its_file(tmp_path):
    path = tmp_path / "sweep.yaml"
    common = "common: {data: shards, targets: t}\n"
    for text, place in {
        "grid:\n  optim.lr: [1e-3, fast]\n": "line 3: run optim.lr-fast".replace("optim.", ""),
        "runs:\n  a:\n    optim: {lr: fast}\n": "line 4: run a",
    }.items():
        path.write_text(f"{common}{text}")
        with pytest.raises(ValueError, match="expected a number") as refused:
            runs_of(SweepConfig(file=str(path), out="out"))
        assert str(refused.value) == f"{path}, {place}: optim.lr: got 'fast', expected a number"
    path.write_text(yaml.safe_dump({"runs": {"a": {"preset": ["nano"]}}}))
    with pytest.raises(ValueError, match=r"run a: got preset \['nano'\], expected one of vit-b"):
        runs_of(SweepConfig(file=str(path), out="out"))
