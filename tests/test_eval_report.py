"""`salt-eval report`: everything that is there is shown, everything that is not is named."""

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from eval_tools import CONFIG, FINGERPRINT, MASK, VIEW, make_dataset, make_run, probe_results
from scipy.stats import linregress
from typer.testing import CliRunner

from salt_distill.common.config import (
    ReportConfig,
    StudentRun,
    TeacherRun,
    VJepaRun,
    dump_yaml,
    mask_layer,
)
from salt_distill.student_trainer.cli import app
from salt_distill.student_trainer.evaluation.finished_runs import find_runs
from salt_distill.student_trainer.evaluation.probe.results import ProbeResults
from salt_distill.student_trainer.evaluation.probe.score import Score
from salt_distill.student_trainer.evaluation.report import clip_pictures, predictions, sharing
from salt_distill.student_trainer.evaluation.report.blocks import (
    BarTable,
    Chart,
    ColourKey,
    Columns,
    CommandLine,
    DataTable,
    Heading,
    LargeNumbers,
    NamedBar,
    Paragraph,
    Picture,
    ReportPage,
    Section,
)
from salt_distill.student_trainer.evaluation.report.build import run
from salt_distill.student_trainer.evaluation.report.figures import LossCurve, loss_curves
from salt_distill.student_trainer.evaluation.report.findings import difference_interval
from salt_distill.student_trainer.evaluation.report.render import html_of
from salt_distill.student_trainer.evaluation.report.run_command import command_of
from salt_distill.student_trainer.evaluation.report.sharing import ServiceStatus
from salt_distill.student_trainer.evaluation.selection import MeasuredCheckpoint, SelectResults

STATUS = {
    "fingerprint": FINGERPRINT,
    "clip_shape": [4, 32, 32, 3],
    "grid": [2, 4, 4],
    "num_parameters": 1000,
    "counters": {
        "clips_served": 30, "clips_computed": 15, "coalesced": 5, "from_memory": 10, "shared": 9,
        "bytes_in": 200_000, "bytes_out": 90_000, "forward_s": 0.5,
    },
}  # fmt: skip
ACCURACY = {
    "random-init": {"digit": 0.1, "motion": 0.125},
    "teacher": {"digit": 0.2, "motion": 0.8},
    "student-b": {"digit": 0.3, "motion": 0.7},
}

# Of three students with three checkpoints each: the loss, and the probe's accuracy where there is one
LOSSES = {
    "student-a/step-1": (0.62, 0.21), "student-a/step-2": (0.50, 0.38), "student-a": (0.41, 0.52),
    "student-b/step-1": (0.60, None), "student-b/step-2": (0.47, None), "student-b": (0.39, 0.50),
    "student-c/step-1": (0.66, None), "student-c/step-2": (0.52, 0.33), "student-c": (0.44, None),
}  # fmt: skip


def selection(points: dict[str, tuple[float, float | None]], label: str | None = "motion") -> SelectResults:
    checkpoints = [
        MeasuredCheckpoint(name=name, fingerprint=FINGERPRINT, x=x, accuracy=accuracy)
        for name, (x, accuracy) in points.items()
    ]
    return SelectResults.of(
        checkpoints,
        by="student-loss",
        split="test",
        index_hash="cd" * 32,
        label=label,
        probe_index_hash="cd" * 32,
    )


SELECTION = selection(LOSSES)


def section_html(section: Section) -> str:
    """As on the page."""
    html = html_of(ReportPage(title="", lead=[], made="", sections=[section], footer=""))
    return html[html.index("<section>") : html.index("</section>")]


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
    runs, _ = find_runs((), folder)
    fingerprints = {run.name: run.fingerprint for run in runs} | {"random-init": "ef" * 32}
    probe_results(ACCURACY, fingerprints).write(folder / "probe.json")
    SELECTION.write(folder / "select.json")
    (folder / "server.json").write_text(json.dumps(STATUS))
    (folder / "steps.tsv").write_text("pack\t1.5\nteacher\t20.25\n")
    return folder


def test_a_whole_report(demo, capsys):
    run(ReportConfig(runs=str(demo)))
    text = (demo / "report.html").read_text()
    found = Page(text)
    assert [source[:22] for source in found.loads] == ["data:image/png;base64,"] * (9 + 5)
    assert (
        re.findall(
            r"https?:|//|@import|<script|<link", re.sub(r"base64,[A-Za-z0-9+/=]*|<code>.*?</code>", "", text)
        )
        == []
    )
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
    assert section_html(predictions.section(SELECTION, find_runs((), demo)[0])) in text
    assert "Not in this report" not in text
    assert f"Stage 2, teacher {FINGERPRINT[:12]}: student-a, student-b, student-c" in text
    assert "mean and the deviation of each cube are taken from the input" in text
    lead = text[text.index("<h1>") : text.index("<section>")]
    assert "Compared: 1 V-Pixel teacher and 3 students of 1 frozen teacher." in lead
    low, high = difference_interval(0.8, (0.7, 0.85), 0.125, (0.025, 0.175))
    assert (
        "On motion (4 classes, 80 test clips) teacher, best of 2 encoders, names 80.0% right [70.0% to 85.0%]"
        f", +67.5 points against random weights (12.5%), 95% interval {100 * low:+.1f} to {100 * high:+.1f}."
    ) in lead
    assert "by salt-distill 0." in lead
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
        "student-b": {"appearance": 0.3, "motion": 0.7},
    }
    assert summary["seconds"] == {"pack": 1.5, "teacher": 20.25}


def test_a_report_of_unfinished_runs_alone_says_so(tmp_path, data, capsys):
    for name in ("one", "two"):
        (make_run(tmp_path / "runs" / name, data) / "summary.json").unlink()
    (tmp_path / "runs" / "two" / "metrics.jsonl").unlink()
    run(ReportConfig(runs=str(tmp_path / "runs")))
    text = (tmp_path / "runs" / "report.html").read_text()
    lead = text[text.index("<h1>") : text.index("<section>")]
    assert "No run has finished: what stands here may still change." in lead
    assert "Not finished: one (step 3 of 3) and two (step 0 of 3)." in lead
    assert "one (unfinished)" in capsys.readouterr().out
    assert text.count('role="img"') == 1
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert (summary["teacher"], summary["students"]) == (None, [])


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
        "unfinished (unfinished)",
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
    empty = probe_results(ACCURACY, dict.fromkeys(ACCURACY, FINGERPRINT)).model_dump()
    tables = {name: {} for name in ("accuracy", "interval", "num_correct", "setting", "encoders", "labels")}
    ProbeResults.model_validate(empty | tables).write(demo / "probe.json")
    run(ReportConfig(runs=str(demo)))
    assert "No probe: the data set has no labels" in (demo / "report.html").read_text()
    assert json.loads((demo / "summary.json").read_text())["probe"] == {}


def test_what_is_predicted_for_runs_without_a_probe(demo):
    """Every checkpoint is drawn once: filled where it was probed; open, with its interval, where it was
    not."""
    shown = section_html(predictions.section(SELECTION, find_runs((), demo)[0]))
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
    alone = selection({"student-a": (0.4, None), "student-b": (0.3, None)}, label=None)
    alone.write(demo / "select.json")
    assert SelectResults.read(demo / "select.json") == alone
    shown = section_html(predictions.section(alone, find_runs((), demo)[0]))
    assert "<td>student-b</td><td>0.3000</td><td>-</td><td>-</td>" in shown
    assert "needs 3 probed checkpoints" in shown
    assert "<svg" not in shown
    (demo / "select.json").write_text(json.dumps({"r2": None}))
    with pytest.raises(
        ValueError,
        match="got by is required; expected what `salt-eval select` of this version writes: run it again",
    ):
        run(ReportConfig(runs=str(demo)))


def test_what_sharing_saved():
    shared = ServiceStatus.model_validate(STATUS).sharing()
    assert (shared.forwards_avoided, shared.repeated) == (9, 6)
    assert shared.flops_saved == 9 * 2 * 1000 * 32
    assert shared.bytes_not_uploaded == 9 * 4 * 32 * 32 * 3


def test_a_run_alone_shares_nothing():
    """Its own second epoch costs no forward, and is nobody's sharing."""
    counters = STATUS["counters"] | {"shared": 0}
    alone = ServiceStatus.model_validate(STATUS | {"counters": counters}).sharing()
    assert (alone.forwards_avoided, alone.flops_saved, alone.bytes_not_uploaded) == (0, 0, 0)
    assert alone.repeated == 15
    assert ">0</b><span>targets that another run had asked for first, 0%" in section_html(
        sharing.section(alone, [])
    )


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


def test_accuracies_are_those_of_the_weights_not_of_the_name(demo):
    """student-b was trained again after the probe; student-a has the weights of the teacher, and so its
    accuracy."""
    runs, _ = find_runs((), demo)
    fingerprints = {run.name: run.fingerprint for run in runs}
    probe_results(
        {"teacher": {"motion": 0.8}, "student-b": {"motion": 0.7}}, fingerprints | {"student-b": "ef" * 32}
    ).write(demo / "probe.json")
    run(ReportConfig(runs=str(demo)))
    text = (demo / "report.html").read_text()
    rows = dict(re.findall(r"<tr><td>([a-z-]+)</td>.*?<td>([^<]*)</td></tr>", text.split("</section>")[0]))
    assert rows["student-a"] == "0.800"
    assert (
        f"No accuracy of student-b: the probe&#39;s student-b has other weights ({'ef' * 6}; the run" in text
    )


def test_names_are_escaped():
    hostile = '<script>alert("x")</script>'
    curve = LossCurve(name=hostile, colour=0, steps=[1, 2], flops=[1.0, 2.0], losses=[1.0, 0.5])
    blocks = [
        Paragraph(hostile),
        Heading(hostile),
        DataTable([hostile], [[hostile]]),
        BarTable((hostile, hostile), [NamedBar(hostile, hostile, 1.0)]),
        LargeNumbers([(hostile, hostile)]),
        Picture(hostile, hostile),
        Columns([[Paragraph(hostile)]]),
        ColourKey([((0, 0, 0), hostile)]),
        CommandLine(hostile, [hostile]),
        Chart(loss_curves([curve, curve], chart_id="x", loss_name=hostile).svg),
    ]
    sections = [Section(hostile, blocks)]
    html = html_of(ReportPage(title=hostile, lead=[hostile], made=hostile, sections=sections, footer=hostile))
    assert "<script" not in html
    assert html.count("alert") > 15


def test_the_interval_of_a_difference():
    """Against Newcombe's own example (1998, Table II (a)): 56 of 70 and 48 of 80, method 10."""
    first, second = Score(num_correct=56, num_clips=70), Score(num_correct=48, num_clips=80)
    interval = difference_interval(first.accuracy, first.interval, second.accuracy, second.interval)
    assert interval == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_a_command_makes_the_configuration_again(tmp_path, data):
    """Of every objective, with nested keys, masks, flags that are switched off and values that are none."""
    runs = [
        StudentRun(
            data=str(data), out="my runs/a", steps=40, teacher_url="http://127.0.0.1:1", views=2,
            optim={"warmup_steps": 3}, mask=mask_layer("random-tube")["mask"], masked_targets=True,
        ),
        TeacherRun(data="s3://bucket/shards", out="b", steps=9, view={"crop_size": (64, 96)}, mask=MASK,
                   optim={"warmup_steps": 1}, compute={"compile": False}, pixel_norm="joint"),
        VJepaRun(data=str(data), out="c", steps=30_000, loader={"frame_cache_bytes": 0}),
    ]  # fmt: skip
    for number, config in enumerate(runs):
        path = tmp_path / str(number)
        path.mkdir()
        (path / "config.yaml").write_text(dump_yaml(config))
        command = shlex.split(command_of(path))
        made = CliRunner().invoke(app, [*command[1:], "--print-config"])
        assert made.exit_code == 0, made.output
        assert type(config).model_validate(yaml.safe_load(made.stdout)) == config


def test_a_run_of_another_version_is_named_by_its_file(tmp_path, data):
    path = make_run(tmp_path / "old", data)
    with (path / "config.yaml").open("a") as file:
        file.write("forgotten_key: 1\n")
    assert command_of(path) == f"salt-train teacher --config {path / 'config.yaml'}"


def test_the_first_steps_do_not_flatten_a_chart():
    """A curve that begins far up ends where it can be read; what stands above is said; equal curves are
    told apart."""
    steps = list(range(1, 101))
    losses = [7.0, 2.0, *(0.5 - 0.002 * step for step in steps[2:])]
    first = LossCurve(name="a", colour=0, steps=steps, flops=[1e12 * step for step in steps], losses=losses)
    chart = loss_curves([first, replace(first, name="b", colour=1)], chart_id="x", loss_name="L1")
    assert chart.notes == [
        "Above the axis: a, up to 7.",
        "Above the axis: b, up to 7.",
        "A dashed curve lies on a wide one: they are the same to 1% of the axis.",
    ]
    assert "b (on a)" in chart.svg
    assert "TFLOPs" in chart.svg
    assert "1e12" not in chart.svg
    ticks = [float(text) for text in re.findall(r">(\d\.\d+)</text>", chart.svg)]
    assert max(ticks) < 0.6
    short = replace(first, steps=steps[:4], flops=first.flops[:4], losses=losses[:4])
    assert loss_curves([short], chart_id="x", loss_name="L1").notes == []
    point = replace(first, steps=[1], flops=[1e12], losses=[0.5])
    drawn = loss_curves([point], chart_id="x", loss_name="L1").svg
    assert len(re.findall(r"<use [^>]*fill: var\(--s0\)", drawn)) == 2, (
        "a line of one point is seen, in both charts"
    )


def test_small_tokens_are_shown_at_full_size():
    picture = Picture("data:,", "caption")
    fine = CONFIG.model_copy(update={"view": VIEW.model_copy(update={"crop_size": 64})})
    assert clip_pictures._row([picture], fine) == [replace(picture, full_size=True)]
    assert clip_pictures._row([picture], CONFIG) == [Columns([[picture]])]
    assert '<figure class="full">' in section_html(Section("", clip_pictures._row([picture], fine)))
