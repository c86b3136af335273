"""The study: what it runs, how it goes on, and what it says of what it found."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.experiment import Job, Lengths
from benchmarks.study.findings import Findings, difference
from benchmarks.study.jobs import MEMORIES, RATE_TUNING, RATES, TUNING, steps_of_equal_flops, study
from benchmarks.study.page import write_page
from benchmarks.study.runner import ENDED, JobError, read_ended, run
from benchmarks.study.sharing import Cost, Sharing, sharing
from benchmarks.study.strokes import (
    ARCHIVE,
    GROUND,
    LONGEST_LIFT_MS,
    NUM_FRAMES,
    TEST_DRAWERS,
    draw,
    drawings,
    read_strokes,
)

ROOT = Path(__file__).parent.parent
LABELLED = ROOT.parent / "shared/data/labelled"
TWO_STROKES = "START\n10,-10,0\n90,-10,400\nBREAK\nSTART\n50,-20,5400\n50,-90,5800\nBREAK\n"


def test_a_pen_only_adds_ink_and_the_last_frame_has_all_of_it():
    strokes = read_strokes(TWO_STROKES)
    frames = draw(strokes).astype(int)
    assert frames.shape == (NUM_FRAMES, 40, 40, 3)
    assert (np.diff(frames, axis=0) >= 0).all()
    written = (frames > GROUND).any(axis=-1)
    assert written[0].sum() < written[7].sum() < written[-1].sum()
    assert written[-1][4, 4:34].all()  # the first stroke, 10 to 90 of 105, at a row of 10 of 105
    assert written[-1][8:34, 19].all()


def test_a_lifted_pen_that_waits_is_cut_short():
    first, second = read_strokes(TWO_STROKES)
    assert second[0, 2] - first[-1, 2] == LONGEST_LIFT_MS
    assert second[-1, 2] - second[0, 2] == 400


@pytest.mark.parametrize("text", ["", "START\n1,-1,0\n", "START\nBREAK\n"])
def test_a_drawing_without_whole_strokes_is_an_error(text):
    with pytest.raises(ValueError, match="expected one or more, each ended by BREAK"):
        read_strokes(text)


@pytest.mark.needs_data
def test_drawings_are_of_136_characters_by_20_people():
    found = list(drawings(LABELLED / ARCHIVE))
    assert len(found) == len({name for name, *_ in found}) == 2720
    assert len({character for _, _, character, _, _ in found}) == 136
    assert sum(drawer in TEST_DRAWERS for *_, drawer, _ in found) == 136 * 6
    assert all(len(read_strokes(text)) >= 1 for *_, text in found)


def test_differences_have_the_interval_of_a_paired_t_test():
    from scipy.stats import ttest_rel

    better, worse = [0.9, 0.8, 0.85], [0.7, 0.72, 0.6]

    def difference_of(first, second):
        return difference(dict(enumerate(first)), dict(enumerate(second)))

    found = difference_of(better, worse)
    expected = ttest_rel(better, worse).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.verdict == "open: above 0 in each seed, but the interval has 0 in it"
    assert difference_of([0.5, 0.51, 0.52], [0.1, 0.1, 0.1]).verdict == "**holds**"
    assert difference_of([0.5, 0.1, 0.52], [0.1, 0.5, 0.1]).verdict == "open: the interval has 0 in it"
    assert difference_of([0.1, 0.11, 0.1], [0.5, 0.5, 0.52]).verdict == "**does not hold**"
    assert difference_of([0.9], [0.1]).verdict == "one seed, no verdict"
    assert difference({10: 0.9, 11: 0.5, 12: 0.7}, {12: 0.5, 10: 0.8}).by_seed == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize("labelled", [None, Path("labelled")])
@pytest.mark.parametrize("real", [None, Path("videos")])
@pytest.mark.parametrize("is_large", [False, True])
def test_every_job_comes_after_what_it_needs(labelled, real, is_large):
    made: set[str] = set()
    for job in study(Lengths(), labelled=labelled, real=real, is_large=is_large):
        assert made.issuperset(job.needs), job
        assert job.name not in made
        made.add(job.name)
    assert any("strokes" in name for name in made) == (labelled is not None)
    assert ("digits/seed-12/chain-probe.json" in made) == is_large
    assert ("real/seed-12/neighbours.json" in made) == (is_large and real is not None)
    assert "digits/seed-14/base-probe.json" in made


def test_the_baseline_gets_the_settings_that_tell_motion_best_on_a_seed_of_their_own(tmp_path):
    momenta = {f"ema-{memories}": {"motion": 0.3, "digit": 0.9} for memories in MEMORIES}
    momenta["ema-60"] = {"motion": 0.4, "digit": 0.1}
    rates = {f"ema-rate-{name}": {"motion": 0.39, "digit": 0.9} for name in list(RATES)[1:]}
    (tmp_path / TUNING).parent.mkdir(parents=True)
    (tmp_path / TUNING).write_text(json.dumps({"accuracy": momenta}))
    (tmp_path / RATE_TUNING).write_text(json.dumps({"accuracy": rates}))
    jobs = {job.name: job for job in study(Lengths(), labelled=None, real=Path("videos"), is_large=True)}

    def settings(name):
        command = jobs[name].command(tmp_path)
        return [value for value in command if str(value).startswith(("ema.", "optim.lr", "optim.final_lr"))]

    momentum = ["ema.start=0.97", "ema.end=0.97"]
    assert settings("digits/seed-10/ema") == [*momentum, "optim.lr=0.001", "optim.final_lr=0.001"]
    rates["ema-rate-0.003-to-0.002"]["motion"] = 0.41
    (tmp_path / RATE_TUNING).write_text(json.dumps({"accuracy": rates}))
    tried = [*momentum, "optim.lr=0.003", "optim.final_lr=0.002"]
    assert settings("digits/seed-10/ema") == settings("digits/seed-100/ema-rate-0.003-to-0.002") == tried
    assert settings("real/seed-10/ema")[-2:] == ["ema.start=0.985", "ema.end=0.985"]
    assert RATE_TUNING in jobs["digits/seed-10/ema"].needs
    assert settings("digits/seed-100/ema-540") == ["ema.start=0.73", "ema.end=0.73"]
    assert not any("seed-100" in name for name in jobs if "ema-" not in name and "probe" not in name)


def test_a_student_begins_with_weights_that_none_of_its_teachers_began_with():
    jobs = study(Lengths(seeds=1, large_seeds=1), labelled=None, real=Path("videos"), is_large=True)
    seeds: dict[str, list[int]] = {}
    for job in jobs:
        run = job.name.rpartition("/")[2]
        if not run.startswith(("teacher", "student")) or run.endswith("-targets"):
            continue
        command = list(job.command(Path("runs")))
        seed = command[command.index("--seed") + 1]
        before = [name.removesuffix("-targets") for name in job.needs if name.endswith("-targets")]
        assert (command[1] == "student") == (len(before) == 1)
        seeds[job.name] = [seed, *(one for name in before for one in seeds[name])]
    assert all(len(set(one)) == len(one) for one in seeds.values())
    assert len(seeds["digits/seed-10/student-third"]) == 4


def test_sharing_counts_what_students_would_have_asked_for(tmp_path):
    seed = tmp_path / "digits/seed-0"
    assert sharing(tmp_path) is None
    (seed / "teacher-targets").mkdir(parents=True)
    manifest = json.dumps({"files": {"a": {"rows": 30}, "b": {"rows": 10}}})
    (seed / "teacher-targets/manifest.json").write_text(manifest)
    for name, steps in (("student", 5), ("student-deep", 20)):
        (seed / name).mkdir()
        (seed / name / "config.yaml").write_text(f"targets: /elsewhere/seed-0/teacher-targets\n# {name}\n")
        (seed / name / "summary.json").write_text(json.dumps({"steps": steps, "batch_size": 8}))
    lines = ["digits/seed-0/teacher\t99.0\t7200.0", "digits/seed-0/teacher-targets\t99.0\t3600.0"]
    (tmp_path / ENDED).write_text("\n".join(lines) + "\n")
    num_bytes = len(manifest)
    assert sharing(tmp_path) == Sharing(
        num_teachers=1,
        num_students=2,
        shared=Cost(forwards=40, hours=1.0, num_bytes=num_bytes),
        apart=Cost(forwards=80, hours=2.0, num_bytes=2 * num_bytes),
        uncached_forwards=200,
        training_hours=2.0,
        training_hours_apart=4.0,
    )


def test_equal_flops_are_those_of_teacher_and_student_together(tmp_path):
    for name, flops, steps in (("teacher", 300.0, 10), ("student", 500.0, 10), ("ema", 640.0, 20)):
        (tmp_path / "base" / name).mkdir(parents=True)
        (tmp_path / "base" / name / "summary.json").write_text(json.dumps({"flops": flops, "steps": steps}))
    assert steps_of_equal_flops(tmp_path, "base") == 25


def python(name: str, program: str, **values) -> Job:
    return Job(name=name, command=lambda root: ["python", "-c", program, root / name], **values)


MAKE = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'made').write_text('x')"


def test_jobs_run_once_in_the_order_of_their_needs(tmp_path):
    needs_first = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); assert (p.parent / 'first/made').exists();"
        " p.mkdir()"
    )
    jobs = [
        python("first", f"import time; time.sleep(0.5); {MAKE}"),
        python("second", needs_first, needs=("first",)),
    ]
    assert run(jobs, tmp_path, at_once=2, minutes=None)
    assert set(read_ended(tmp_path)) == {"first", "second"}
    assert read_ended(tmp_path)["first"].wall_s >= 0.5
    assert run([python("first", "raise SystemExit(1)"), *jobs[1:]], tmp_path, at_once=2, minutes=None)


def test_what_time_ran_out_for_starts_again_from_nothing_or_goes_on(tmp_path):
    slow = (
        "import sys, pathlib, time; p = pathlib.Path(sys.argv[1]); p.mkdir(exist_ok=EXIST); (p /"
        " 'made').write_text('x'); time.sleep(WAIT)"
    )
    anew, on = slow.replace("EXIST", "False"), slow.replace("EXIST", "True")
    started = time.monotonic()
    jobs = [python("anew", anew.replace("WAIT", "60")), python("on", on.replace("WAIT", "60"), goes_on=True)]
    assert not run(jobs, tmp_path, at_once=2, minutes=2 / 60)
    assert time.monotonic() - started < 30
    assert (tmp_path / "anew/made").exists()
    assert read_ended(tmp_path) == {}
    (tmp_path / "on/kept").write_text("x")
    assert run(
        [python("anew", anew.replace("WAIT", "0")), python("on", on.replace("WAIT", "0"), goes_on=True)],
        tmp_path,
        at_once=2,
        minutes=None,
    )
    assert (tmp_path / "on/kept").exists()


def test_a_job_that_fails_ends_the_study_with_what_it_said(tmp_path):
    jobs = [
        python("bad", "raise SystemExit('no such shards')"),
        python("long", "import time; time.sleep(60)"),
    ]
    started = time.monotonic()
    with pytest.raises(
        JobError, match=r"(?s)bad ended with exit status 1; .*logs/bad.txt has all.*no such shards"
    ):
        run(jobs, tmp_path, at_once=2, minutes=None)
    assert time.monotonic() - started < 30
    assert read_ended(tmp_path) == {}


def test_the_page_says_what_was_not_run(tmp_path):
    write_page(tmp_path / "page/study.md", tmp_path / "runs", Lengths(), has_strokes=False, has_real=True)
    page = (tmp_path / "page/study.md").read_text()
    assert "pen strokes: they were not there" in page
    assert "real videos: 0 of 3 seeds are through" in page
    assert page[page.index("## Not run") :].count("\n- ") == 9
    assert "holds**" not in page


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_the_whole_study_at_toy_length_in_pieces(tmp_path):
    lengths = ["--seeds", 1, "--steps", 8, "--videos", 160, "--probe-epochs", 1]
    command = [
        *(
            sys.executable,
            "-m",
            "benchmarks.study",
            "--large",
            "--out",
            tmp_path / "runs",
            "--page",
            tmp_path / "page/study.md",
        ),
        *lengths,
    ]
    pieces = []
    for minutes in (0.7, 30):
        ended = subprocess.run(
            [*map(str, command), "--minutes", str(minutes)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        pieces.append(ended.returncode)
        assert ended.returncode in (0, 3), ended.stderr
    assert pieces == [3, 0]
    page = (tmp_path / "page/study.md").read_text()
    found = Findings(root=tmp_path / "runs", seeds=[10])
    accuracy = found.accuracies("digits", "student-third", "motion", "chain")[10]
    [row] = [line for line in page.splitlines() if line.startswith("| student-third |")]
    assert row.split(" | ")[2].startswith(f"{accuracy:.3f} (")
    assert len(found.selections()[10]["checkpoints"]) == 12
    summary = json.loads((tmp_path / "runs/digits/seed-10/ema-equal-flops/summary.json").read_text())
    assert summary["flops"] == pytest.approx(found.flops("digits", "student"), rel=0.1)
    assert "| **SALT and the EMA baseline at equal FLOPs**, seed 10 | | | |" in page
    figures = {path.name for path in (tmp_path / "page").glob("*.png")}
    assert figures == {f"study-{name}.png" for name in ("accuracy", "compute", "loss", "decisions")}
    assert all(f"]({name})" in page for name in figures)
    saved = sharing(tmp_path / "runs")
    assert f"{saved.num_students} students of {saved.num_teachers} teachers" in page
    assert saved.num_students > saved.num_teachers
    assert saved.shared.forwards < saved.apart.forwards
