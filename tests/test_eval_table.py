"""Tables of runs: the paper's averages come of its numbers, and results are joined by fingerprints."""

import json

import pytest
from eval_tools import VIEW, make_dataset, make_run, probe_results
from test_eval_select import frozen, student

from salt_distill.common.config import TableConfig
from salt_distill.student_trainer.evaluation.finished_runs import (
    FinishedRun,
    ParameterCounts,
    RunResults,
    RunSettings,
    TeacherName,
)
from salt_distill.student_trainer.evaluation.physics.results import PhysicsResults
from salt_distill.student_trainer.evaluation.records import EncoderIdentity
from salt_distill.student_trainer.evaluation.table.measured import Measured, MeasuredRun, TrainingData
from salt_distill.student_trainer.evaluation.table.paper import paper_tables
from salt_distill.student_trainer.evaluation.table.rows import ResultTable
from salt_distill.student_trainer.evaluation.table.run import run


def made_run(objective, size, scores, *, teacher=None, steps=80_000, flops=0.241e21, data="V-3.6M"):
    """A run that says what the paper says of one."""
    results = RunResults(
        objective=objective, source=None, steps=steps, batch_size=3072, loss_first=1.0, loss_last=0.1,
        flops=flops, step_ms=1.0, teacher_wait_ms=None,
        num_parameters=ParameterCounts(encoder=1, predictor=22_000_000),
        teacher=None if teacher is None else TeacherName(fingerprint="00"),
    )  # fmt: skip
    name = f"{objective}-{size}-{steps}"
    settings = RunSettings(data=data, split="train", seed=0, batch_size=3072)
    return MeasuredRun(
        run=FinishedRun(name=name, path=None, settings=settings, results=results, metrics=[]),
        size=size,
        teachers=[teacher] if objective == "salt" else [],
        data=TrainingData(name=data, num_samples=None),
        flops=flops + (0 if teacher is None else teacher.flops),
        scores={key: value / 100 for key, value in scores.items()},
    )


def cells(table: ResultTable, run_name: str) -> dict[str, str]:
    [row] = [row for block in table.blocks for row in block.rows if row[-1] == run_name]
    return dict(zip(table.columns, row, strict=True))


FOUR = ("k400", "ssv2", "in1k", "coin")
SIX = ("in1k", "k400", "ssv2", "coin", "diving48", "jester")


def test_the_papers_averages_come_of_the_papers_numbers():
    """Rows of Tables 9, 12, 14 and 16 as printed."""
    teacher = made_run("vpixel", "ViT-L", dict(zip(SIX, (75.5, 70.4, 66.2, 77.9, 76.8, 96.9), strict=True)))
    salt = made_run(
        "salt", "ViT-L", dict(zip(FOUR, (76.0, 71.3, 79.0, 85.3), strict=True)) | {
            "diving48": 82.5, "jester": 97.2, "intphys": 90.6, "grasp": 53.5, "inflevel": 54.2,
        }, teacher=teacher, steps=160_000, flops=0.951e21,
    )  # fmt: skip
    baseline = made_run(
        "vjepa", "ViT-L", dict(zip(SIX, (73.7, 73.3, 68.4, 83.1, 82.1, 97.0), strict=True)), steps=240_000,
        flops=1.9e21,
    )  # fmt: skip
    small = made_run(
        "vjepa", "ViT-B", {"intphys": 76.6, "grasp": 56.1, "inflevel": 52.4}, steps=240_000, flops=0.6e21
    )
    physics, methods, _, sizes, budgets = paper_tables(
        Measured(runs=[teacher, salt, baseline, small], others=[], remarks=[])
    )
    assert cells(physics, "vjepa-ViT-B-240000")["Avg"] == "61.7"
    assert cells(physics, "salt-ViT-L-160000") | {"Avg": "66.1", "Predictor": "22M"} == cells(
        physics, "salt-ViT-L-160000"
    )
    assert cells(methods, "vjepa-ViT-L-240000")["Avg"] == "79.6"
    assert cells(methods, "vpixel-ViT-L-80000")["Avg"] == "77.3"
    assert cells(methods, "salt-ViT-L-160000")["Avg"] == "81.9"
    assert cells(sizes, "vpixel-ViT-L-80000")["Avg"] == "72.5"
    of_budget = cells(budgets, "salt-ViT-L-160000")
    assert (of_budget["Teacher steps"], of_budget["Student steps"], of_budget["Avg"]) == (
        "80k",
        "160k",
        "77.9",
    )
    assert [of_budget[f"{name} FLOPs"] for name in ("Teacher", "Student", "Total")] == [
        "0.241",
        "0.951",
        "1.192",
    ]
    assert cells(budgets, "vjepa-ViT-L-240000")["Avg"] == "74.6"
    assert cells(budgets, "vjepa-ViT-L-240000")["Total FLOPs"] == "1.900"


def test_every_row_of_the_paper_is_there_and_empty_where_nothing_was_run():
    tables = paper_tables(Measured(runs=[], others=[], remarks=[]))
    numbers = [[len(block.rows) for block in table.blocks] for table in tables]
    assert numbers == [[0, 3, 0, 3], [3, 2, 5], [6, 6], [4, 7], [6, 4, 4]]
    for table in tables:
        for block in table.blocks:
            assert all(len(row) == len(table.columns) for row in block.rows)
            assert not any("".join(row[table.num_texts :]) for row in block.rows)
    partly = made_run("vpixel", "ViT-L", {"k400": 70.4})
    row = cells(paper_tables(Measured(runs=[partly], others=[], remarks=[]))[3], partly.run.name)
    assert (row["K400"], row["SSv2"], row["Avg"]) == ("70.4", "", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, two students of it, and what a probe says of them, under other names."""
    folder = tmp_path_factory.mktemp("table")
    data = make_dataset(folder / "toy")
    teacher = make_run(folder / "teacher", data, seed=10)
    fingerprint = frozen(teacher).spec.fingerprint
    students = [student(folder / name, data, fingerprint, seed) for seed, name in enumerate("ab")]
    for path in students:
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | {"teacher": {"fingerprint": fingerprint}}))
    prints = {
        name: frozen(path).spec.fingerprint for name, path in zip("xy", (teacher, students[0]), strict=True)
    }
    accuracy = {"x": {"shade": 0.5}, "y": {"shade": 0.75}}
    for name, values in (("k400", accuracy), ("ssv2", {key: {"shade": 0.25} for key in accuracy})):
        probe_results(values, prints).write(folder / f"{name}.json")
    return folder, [str(path) for path in (teacher, *students)]


def test_results_are_joined_by_the_weights(made, tmp_path, capsys):
    folder, runs = made
    probes = tuple(f"{name}={folder / name}.json" for name in ("k400", "ssv2"))
    run(TableConfig(run_dirs=tuple(runs), probe=probes, json_=True))
    printed = capsys.readouterr()
    rows = {row["run"]: row for row in json.loads(printed.out)[0]["rows"]}
    assert {name: (row["K400"], row["SSv2"], row["Avg"]) for name, row in rows.items()} == {
        "teacher": ("50.0", "25.0", "37.5"),
        "a": ("75.0", "25.0", "50.0"),
        "b": ("", "", ""),
    }
    assert rows["a"]["steps"] == "3+3"
    assert "Nothing was measured of b's newest checkpoint." in printed.err
    out = tmp_path / "tables.md"
    run(TableConfig(run_dirs=(runs[1],), probe=probes, layout="paper", out=str(out)))
    printed = capsys.readouterr()
    assert "The teacher of a is not among the runs" in printed.err
    assert "Table 16" in printed.out
    assert "| ? |" in out.read_text()


def physics(path, benchmark, accuracy, *, encoder, run_fingerprint, teacher=None):
    """A file of `salt-eval physics`."""
    PhysicsResults(
        benchmark=benchmark, encoder=EncoderIdentity(fingerprint=encoder, view=VIEW),
        teacher_fingerprint=teacher, run_fingerprint=run_fingerprint, index_hash="ef" * 32, protocol="p",
        contexts=[2], fixed_context={}, best_context={"average": accuracy, "maximum": 0.0}, accuracy={},
        surprise={}, skipped={},
    ).write(path)  # fmt: skip
    return str(path)


def test_physics_is_joined_by_what_a_run_is_known_by(made, tmp_path, capsys):
    """A baseline by its moving average; a stranger whose teacher is one of the runs is not that run."""
    _, runs = made
    known = frozen(runs[0]).spec.fingerprint  # here as the moving average of a baseline
    files = (
        physics(tmp_path / "a.json", "grasp", 0.6, encoder="11" * 32, run_fingerprint=known, teacher=known),
        physics(
            tmp_path / "s.json", "grasp", 0.9, encoder="22" * 32, run_fingerprint="22" * 32, teacher=known
        ),
    )
    run(TableConfig(run_dirs=tuple(runs), physics=files, layout="paper", json_=True))
    rows = json.loads(capsys.readouterr().out)[0]["rows"]
    grasp = {row["run"] or row["Encoder"]: row["GRASP"] for row in rows if row["GRASP"]}
    assert grasp == {"s": "90.0", "teacher": "60.0"}
    run(TableConfig(run_dirs=tuple(runs), physics=files, json_=True))
    assert f"{files[1]} is not in the tables: it is of none of the runs" in capsys.readouterr().err


def test_two_runs_of_one_name_are_refused(made, tmp_path):
    _, runs = made
    with pytest.raises(ValueError, match="got two runs of one name among"):
        run(TableConfig(run_dirs=(runs[0], runs[0])))


def test_what_may_not_be_put_in_one_column_is_refused(made, tmp_path):
    folder, runs = made
    other = json.loads((folder / "k400.json").read_text()) | {"protocol": "another"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="got another protocol: another for k400, expected those of"):
        run(
            TableConfig(
                run_dirs=(runs[0],), probe=(f"k400={folder}/k400.json", f"k400={tmp_path}/other.json")
            )
        )
    twice = json.loads((folder / "k400.json").read_text())
    twice["accuracy"]["x"]["shade"] = 0.9
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    with pytest.raises(ValueError, match="got a second result of one encoder for k400"):
        run(
            TableConfig(
                run_dirs=(runs[0],), probe=(f"k400={folder}/k400.json", f"k400={tmp_path}/twice.json")
            )
        )
    with pytest.raises(ValueError, match="expected its name to be one of k400"):
        TableConfig(run_dirs=("a",), probe=("digits=probe.json",), layout="paper")
    with pytest.raises(ValueError, match="expected NAME=FILE"):
        TableConfig(run_dirs=("a",), probe=("probe.json",))
