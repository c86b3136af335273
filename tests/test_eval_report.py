"""`salt-eval report`: everything that is there is shown, everything that is not is named."""

import json
import re
from html.parser import HTMLParser

import pytest
from eval_tools import FINGERPRINT, make_dataset, make_run
from scipy.stats import linregress

from salt_distill.common.config import ReportConfig
from salt_distill.student_trainer.evaluation.report import page, predictions
from salt_distill.student_trainer.evaluation.report.build import run
from salt_distill.student_trainer.evaluation.report.figures import Curve, loss_curves
from salt_distill.student_trainer.evaluation.report.sharing import read_sharing
from salt_distill.student_trainer.evaluation.runs import find_runs
from salt_distill.student_trainer.evaluation.selection import Measured, Selection

STATUS = {
    "fingerprint": FINGERPRINT,
    "clip_shape": [4, 32, 32, 3],
    "grid": [2, 4, 4],
    "num_parameters": 1000,
    "counters": {
        "clips_served": 30, "clips_computed": 15, "coalesced": 5, "from_memory": 10,
        "bytes_in": 200_000, "bytes_out": 90_000, "forward_s": 0.5,
    },
}  # fmt: skip
PROBE = {
    "accuracy": {"random-init": {"digit": 0.1, "motion": 0.125}, "teacher": {"digit": 0.2, "motion": 0.8}},
    "interval": {
        "random-init": {"digit": [0.05, 0.2], "motion": [0.06, 0.21]},
        "teacher": {"digit": [0.12, 0.31], "motion": [0.7, 0.87]},
    },
    "labels": {
        "digit": {"num_classes": 10, "chance": 0.1, "num_train": 120, "num_test": 80},
        "motion": {"num_classes": 8, "chance": 0.125, "num_train": 120, "num_test": 80},
    },
    "protocol": "a protocol",
}

# Of three students with three checkpoints each: the loss, and the probe's accuracy where there is one
LOSSES = {
    "student-a/step-1": (0.62, 0.21), "student-a/step-2": (0.50, 0.38), "student-a": (0.41, 0.52),
    "student-b/step-1": (0.60, None), "student-b/step-2": (0.47, None), "student-b": (0.39, 0.50),
    "student-c/step-1": (0.66, None), "student-c/step-2": (0.52, 0.33), "student-c": (0.44, None),
}  # fmt: skip
SELECTION = Selection.of(
    by="student-loss",
    split="test",
    label="motion",
    points=[Measured(name=name, x=x, accuracy=accuracy) for name, (x, accuracy) in LOSSES.items()],
)


class Page(HTMLParser):
    """What a page would load, its ids, and what its fragments point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.fragments: set[str] = set(re.findall(r"url\(#([^)]*)\)", text))
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                (self.fragments.add(value[1:]) if value.startswith("#") else self.loads.append(value))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self.open and tag not in ("meta", "img", "br"):
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("report") / "toy", num_clips=9)


@pytest.fixture
def demo(tmp_path, data):
    folder = tmp_path / "demo"
    make_run(folder / "teacher", data)
    make_run(folder / "student-a", data, source="service")
    make_run(folder / "student-b", data, source="service", seed=1)
    make_run(folder / "student-c", data, source="cache")
    (folder / "probe.json").write_text(json.dumps(PROBE))
    (folder / "select.json").write_text(json.dumps(SELECTION.as_json()))
    (folder / "server.json").write_text(json.dumps(STATUS))
    (folder / "steps.tsv").write_text("pack\t1.5\nteacher\t20.25\n")
    return folder


def test_a_whole_report(demo, capsys):
    run(ReportConfig(runs=str(demo)))
    text = (demo / "report.html").read_text()
    found = Page(text)
    assert [source[:22] for source in found.loads] == ["data:image/png;base64,"] * (9 + 5)
    assert re.findall(r"https?:|//|@import|<script|<link", re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)) == []
    assert len(found.ids) == len(set(found.ids))
    assert found.fragments <= set(found.ids)
    assert found.open == []
    for title in (
        "Runs",
        "Losses",
        "Frozen-backbone probe",
        "Held-out loss against accuracy",
        "The teacher service",
        "Masks",
        "V-Pixel reconstruction",
        "Seconds: 22 in all",
    ):
        assert f"<h2>{title}</h2>" in text
    assert predictions.section(SELECTION, find_runs((), demo)[0]) in text
    assert "Not in this report" not in text
    assert f"Stage 2, teacher {FINGERPRINT[:12]}: student-a, student-b, student-c" in text
    assert "mean and the deviation of each cube are taken from the input" in text
    shown = capsys.readouterr().out
    assert "student-c" in shown
    assert str(demo / "report.html") in shown.replace("\n", "")


def test_summary_of_the_demo(demo):
    run(ReportConfig(runs=str(demo)))
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["teacher"] == {"loss_first": 1.0, "loss_last": pytest.approx(1 / 3)}
    assert [student["source"] for student in summary["students"]] == ["service", "service", "cache"]
    for student in summary["students"]:
        assert set(student) == {"name", "source", "loss_first", "loss_last", "teacher_wait_ms"}
    assert summary["server"] == {"clips_served": 30, "clips_computed": 15}
    assert summary["probe"] == {
        "random-init": {"appearance": 0.1, "motion": 0.125},
        "teacher": {"appearance": 0.2, "motion": 0.8},
    }
    assert summary["seconds"] == {"pack": 1.5, "teacher": 20.25}


def test_what_is_missing_is_said_and_not_made_up(tmp_path, data, capsys):
    make_run(tmp_path / "student", data, source="in-process")
    unfinished = make_run(tmp_path / "unfinished", data)
    (unfinished / "summary.json").unlink()
    run(
        ReportConfig(
            run_dirs=(str(tmp_path / "student"), str(unfinished)), out=str(tmp_path / "out" / "page.html")
        )
    )
    text = (tmp_path / "out" / "page.html").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "the run has not finished",
        "No probe",
        "No held-out losses",
        "No counters",
        "No reconstruction",
        "No seconds",
    ):
        assert sentence in text
        assert sentence in shown
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["teacher"] is None
    assert summary["server"] is None
    assert summary["probe"] == summary["seconds"] == {}


def test_without_the_data_there_are_no_pictures(tmp_path):
    make_run(tmp_path / "runs" / "teacher", tmp_path / "gone")
    run(ReportConfig(runs=str(tmp_path / "runs")))
    text = (tmp_path / "runs" / "report.html").read_text()
    assert "<img" not in text
    assert "No pictures: the data set of teacher" in text


def test_an_empty_probe_is_left_out(demo):
    (demo / "probe.json").write_text(
        json.dumps({"accuracy": {}, "interval": {}, "labels": {}, "protocol": "a protocol"})
    )
    run(ReportConfig(runs=str(demo)))
    assert "No probe: the data set has no labels" in (demo / "report.html").read_text()
    assert json.loads((demo / "summary.json").read_text())["probe"] == {}


def test_what_is_predicted_for_runs_without_a_probe(demo):
    """Every checkpoint is drawn once: filled where it was probed; open, with its interval, where it was
    not."""
    shown = predictions.section(SELECTION, find_runs((), demo)[0])
    oracle = linregress(*zip(*(pair for pair in LOSSES.values() if pair[1] is not None), strict=True))
    assert f"<b>{oracle.rvalue**2:.3f}</b><span>R\u00b2 of 5 probed checkpoints</span>" in shown
    assert f"<b>{oracle.intercept:.3f} - {-oracle.slope:.3g} x</b>" in shown
    assert SELECTION.line is not None
    value, low, high = SELECTION.line.predict(0.44)
    assert (
        f"<td>student-c</td><td>0.4400</td><td>-</td><td>{value:.3f}  [{low:.3f}, {high:.3f}]</td>" in shown
    )
    assert (
        shown.index("<td>student-b</td>")
        < shown.index("<td>student-a</td>")
        < shown.index("<td>student-c/step-1</td>")
    )
    drawn = re.findall(r'<use [^>]*style="([^"]*)"', shown)
    colours = [
        f"var(--s{number})" for number in (1, 2, 3)
    ]  # as in the other charts: the teacher is the first run
    dots = [style for style in drawn if any(f"stroke: {colour}" in style for colour in colours)]
    assert sum("fill: none" in style or "fill-opacity: 0" in style for style in dots) == 4
    assert sum("fill: var(--s" in style for style in dots) == 5 + 3  # and the legend's
    assert "#1d2327" not in shown  # no colour that dark would not change
    assert "#626c74" not in shown


def test_a_selection_without_a_line_is_a_table(demo):
    points = [
        Measured(name="student-a", x=0.4, accuracy=None),
        Measured(name="student-b", x=0.3, accuracy=None),
    ]
    alone = Selection.of(by="student-loss", split="test", label=None, points=points)
    shown = predictions.section(Selection.from_json(alone.as_json()), find_runs((), demo)[0])
    assert "<td>student-b</td><td>0.3000</td><td>-</td><td>-</td>" in shown
    assert "needs 3 checkpoints with a probe" in shown
    assert "<svg" not in shown
    (demo / "select.json").write_text(json.dumps({"r2": None}))
    with pytest.raises(
        ValueError,
        match="got no 'checkpoints', expected what `salt-eval select` of this version writes: run it again",
    ):
        run(ReportConfig(runs=str(demo)))


def test_what_sharing_saved():
    shared = read_sharing(STATUS)
    assert shared.forwards_avoided == 15
    assert shared.flops_saved == 15 * 2 * 1000 * 32
    assert shared.bytes_not_uploaded == 30 * 4 * 32 * 32 * 3 - 200_000


def test_wrong_input_is_one_sentence(tmp_path, data):
    student = make_run(tmp_path / "student", data, source="service")
    with pytest.raises(ValueError, match=r"expected a folder that is no run directory"):
        run(ReportConfig(run_dirs=(str(student),), out=str(student / "report.html")))
    with pytest.raises(ValueError, match=r"expected a run directory: it holds no config.yaml"):
        run(ReportConfig(run_dirs=(str(tmp_path),), out=str(tmp_path / "report.html")))
    with pytest.raises(ValueError, match=r"--runs .*there is no such folder"):
        run(ReportConfig(runs=str(tmp_path / "nothing")))
    (tmp_path / "steps.tsv").write_text("pack 1.5\n")
    with pytest.raises(ValueError, match=r"steps.tsv, line 1: got 'pack 1.5', expected STEP<TAB>SECONDS"):
        run(ReportConfig(runs=str(tmp_path)))


def test_names_are_escaped():
    hostile = '<script>alert("x")</script>'
    curve = Curve(name=hostile, colour=0, steps=[1, 2], flops=[1.0, 2.0], losses=[1.0, 0.5])
    for html in (
        page.page(hostile, hostile, [page.section(hostile, page.text(hostile))], hostile),
        page.table([hostile], [[hostile]]),
        page.figure("data:,", hostile),
        page.bar_table((hostile, hostile), [(hostile, hostile, 1.0)]),
        loss_curves([curve, curve], chart_id="x", loss_name=hostile),
    ):
        assert "<script" not in html
