"""`salt-eval report`: everything that is there is shown, everything that is not is named."""

import json
import re
from html.parser import HTMLParser

import pytest
from eval_tools import FINGERPRINT, make_dataset, make_run

from common.config import ReportConfig
from student_trainer.evaluation import page
from student_trainer.evaluation.figures import Curve, loss_curves
from student_trainer.evaluation.report import run
from student_trainer.evaluation.sharing import read_sharing

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
        "The teacher service",
        "Masks",
        "V-Pixel reconstruction",
        "Seconds: 22 in all",
    ):
        assert f"<h2>{title}</h2>" in text
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
    assert summary["probe"] == {"random-init": {"appearance": 0.1, "motion": 0.125}, "teacher": {"appearance": 0.2, "motion": 0.8}}
    assert summary["seconds"] == {"pack": 1.5, "teacher": 20.25}


def test_what_is_missing_is_said_and_not_made_up(tmp_path, data, capsys):
    make_run(tmp_path / "student", data, source="in-process")
    unfinished = make_run(tmp_path / "unfinished", data)
    (unfinished / "summary.json").unlink()
    run(ReportConfig(run_dirs=(str(tmp_path / "student"), str(unfinished)), out=str(tmp_path / "out" / "page.html")))
    text = (tmp_path / "out" / "page.html").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    for sentence in ("the run has not finished", "No probe", "No counters", "No reconstruction", "No seconds"):
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
    (demo / "probe.json").write_text(json.dumps({"accuracy": {}, "interval": {}, "labels": {}, "protocol": "a protocol"}))
    run(ReportConfig(runs=str(demo)))
    assert "No probe: the data set has no labels" in (demo / "report.html").read_text()
    assert json.loads((demo / "summary.json").read_text())["probe"] == {}


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
