"""The study: what it runs, how it goes on, and what it says of what it found."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.experiment import Job, Lengths
from benchmarks.study.findings import Findings, Point, difference, r2
from benchmarks.study.jobs import MEMORIES, RATE_TUNING, RATES, TUNING, steps_of_equal_flops, study
from benchmarks.study.page import write_page
from benchmarks.study.record import Record, RecordError
from benchmarks.study.runner import JobError, run
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
LENGTHS = Lengths()
TWO_STROKES = "START\n10,-10,0\n90,-10,400\nBREAK\nSTART\n50,-20,5400\n50,-90,5800\nBREAK\n"


def record_in(folder: Path) -> Record:
    return Record(folder / "study.jsonl", LENGTHS)


def recorded(folder: Path, found: dict[str, dict], cpu_s: float = 1.0) -> Record:
    record = record_in(folder)
    for name, values in found.items():
        record.add(name, wall_s=99.0, cpu_s=cpu_s, found=values)
    return record


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
def test_every_job_comes_after_what_it_needs(labelled, real, is_large, tmp_path):
    made: set[str] = set()
    for job in study(LENGTHS, record_in(tmp_path), labelled=labelled, real=real, is_large=is_large):
        assert made.issuperset((*job.needs, *job.after)), job
        assert job.name not in made
        made.add(job.name)
    assert any("strokes" in name for name in made) == (labelled is not None)
    assert ("digits/seed-12/chain-probe.json" in made) == is_large
    assert ("real/seed-12/neighbours.json" in made) == (is_large and real is not None)
    assert "digits/seed-14/base-probe.json" in made
    of_all = {
        name for name in ("flops", "sizes", "data", "split") if f"digits/seed-14/{name}-probe.json" in made
    }
    assert of_all == ({"flops", "sizes", "split"} if is_large else set())


def test_the_baseline_gets_the_settings_that_tell_motion_best_on_a_seed_of_their_own(tmp_path):
    momenta = {f"ema-{memories}": {"motion": 0.3, "digit": 0.9} for memories in MEMORIES}
    momenta["ema-60"] = {"motion": 0.4, "digit": 0.1}
    rates = {f"ema-rate-{name}": {"motion": 0.39, "digit": 0.9} for name in list(RATES)[1:]}
    record = recorded(tmp_path, {TUNING: {"accuracy": momenta}, RATE_TUNING: {"accuracy": rates}})
    jobs = {
        job.name: job for job in study(LENGTHS, record, labelled=None, real=Path("videos"), is_large=True)
    }

    def settings(name):
        command = jobs[name].command(tmp_path)
        return [value for value in command if str(value).startswith(("ema.", "optim.lr", "optim.final_lr"))]

    momentum = ["ema.start=0.97", "ema.end=0.97"]
    assert settings("digits/seed-10/ema") == [*momentum, "optim.lr=0.001", "optim.final_lr=0.001"]
    rates["ema-rate-0.003-to-0.002"]["motion"] = 0.41
    tried = [*momentum, "optim.lr=0.003", "optim.final_lr=0.002"]
    assert settings("digits/seed-10/ema") == settings("digits/seed-100/ema-rate-0.003-to-0.002") == tried
    assert settings("real/seed-10/ema")[-2:] == ["ema.start=0.985", "ema.end=0.985"]
    assert RATE_TUNING in jobs["digits/seed-10/ema"].after
    assert settings("digits/seed-100/ema-540") == ["ema.start=0.73", "ema.end=0.73"]
    assert not any("seed-100" in name for name in jobs if "ema-" not in name and "probe" not in name)


def test_a_student_begins_with_weights_that_none_of_its_teachers_began_with(tmp_path):
    jobs = study(
        Lengths(seeds=1, large_seeds=1),
        record_in(tmp_path),
        labelled=None,
        real=Path("videos"),
        is_large=True,
    )
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
    assert sharing(record_in(tmp_path)) is None
    teacher, targets = "digits/seed-0/teacher", "digits/seed-0/teacher-targets"
    recorded(tmp_path, {teacher: {"targets": None}}, cpu_s=7200)
    recorded(tmp_path, {targets: {"rows": 40, "num_bytes": 900}}, cpu_s=3600)
    students = {
        f"digits/seed-0/student-{steps}": {"steps": steps, "batch_size": 8, "targets": targets}
        for steps in (5, 20)
    }
    assert sharing(recorded(tmp_path, students)) == Sharing(
        num_teachers=1,
        num_students=2,
        num_shared=1,
        shared=Cost(forwards=40, hours=1.0, num_bytes=900),
        apart=Cost(forwards=80, hours=2.0, num_bytes=1800),
        uncached_forwards=200,
        training_hours=2.0,
        training_hours_apart=4.0,
    )


def test_equal_flops_are_those_of_teacher_and_student_together(tmp_path):
    flops = {"teacher": 300.0, "student": 500.0, "ema": 640.0}
    found = {f"base/{name}": {"flops": value, "steps": 20} for name, value in flops.items()}
    assert steps_of_equal_flops(recorded(tmp_path, found), "base") == 25


def test_costs_count_the_teachers_before_a_run_and_the_caches_between(tmp_path):
    teachers = {"teacher": None, "student": "teacher", "student-second": "student"}
    for name, teacher in teachers.items():
        targets = teacher and f"digits/seed-10/{teacher}-targets"
        if targets:
            recorded(tmp_path, {targets: {"rows": 1, "num_bytes": 1}}, cpu_s=6)
        found = {"flops": 10.0, "objective": "salt", "targets": targets}
        recorded(tmp_path, {f"digits/seed-10/{name}": found}, cpu_s=60)
    findings = Findings(record=record_in(tmp_path), seeds=[10, 11])
    assert findings.flops("digits", "student-second") == 30
    assert findings.core_minutes("digits", "student-second") == pytest.approx(3.2)
    assert (
        findings.flops("digits", "student-third") is findings.core_minutes("digits", "student-third") is None
    )
    assert list(findings.runs("digits")) == ["student", "student-second", "teacher"]


def test_a_record_says_where_it_is_not_of_this_study(tmp_path):
    recorded(tmp_path, {"first": {"loss": 0.5}})
    path = tmp_path / "study.jsonl"
    assert record_in(tmp_path)["first"].found == {"loss": 0.5}
    with pytest.raises(
        RecordError, match=r"(?s)runs of \{'steps': 1000.*expected \{'steps': 8.*another --page"
    ):
        Record(path, Lengths(steps=8))
    with path.open("a") as file:
        file.write('{"name": "second", "wall')
    with pytest.raises(RecordError, match=r'line 3: .*"second".*delete the line'):
        record_in(tmp_path)


def python(name: str, program: str, **values) -> Job:
    return Job(name=name, command=lambda root: ["python", "-c", program, root / name], **values)


MAKE = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'made').write_text('x')"


def run_all(jobs, folder: Path, *, root: str = "runs", minutes: float | None = None) -> bool:
    return run(jobs, folder / root, record_in(folder), at_once=2, minutes=minutes)


def test_jobs_run_once_in_the_order_of_their_needs(tmp_path):
    needs_first = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); assert (p.parent / 'first/made').exists();"
        " p.mkdir()"
    )
    jobs = [
        python("first", f"import time; time.sleep(0.5); {MAKE}"),
        python("second", needs_first, needs=("first",)),
        python("third", needs_first, after=("first",)),
    ]
    assert run_all(jobs, tmp_path)
    assert set(record_in(tmp_path)) == {"first", "second", "third"}
    assert record_in(tmp_path)["first"].wall_s >= 0.5
    assert run_all([python("first", "raise SystemExit(1)"), *jobs[1:]], tmp_path)


def test_another_machine_repeats_only_the_jobs_whose_files_are_read(tmp_path, capfd):
    """A machine without the files is a folder without them."""

    def made(path: Path) -> dict:
        return {"text": (path / "made").read_text()}

    again = MAKE.replace("'x'", "'y'")
    data = [python("shards", MAKE, found=made), python("teacher", MAKE, found=made, needs=("shards",))]
    tuning = [python("tuning", MAKE, found=made)]
    assert run_all([*data, *tuning], tmp_path)
    more = [
        python("shards", MAKE, found=made),
        python("teacher", again, found=made, needs=("shards",)),
        python("tuning", "raise SystemExit(1)"),
        python("student", MAKE, needs=("teacher",), after=("tuning",)),
    ]
    assert run_all(more, tmp_path, root="elsewhere")
    made_there = {path.name for path in (tmp_path / "elsewhere").iterdir() if path.is_dir()}
    assert made_there == {"shards", "teacher", "student", "logs"}
    record = record_in(tmp_path)
    assert record["teacher"].found == {"text": "x"}
    said = capfd.readouterr().err
    assert "4 of 4: student, 0 s\n" in said
    assert f"teacher, 0 s, for its files; not as in {tmp_path}/study.jsonl: text\n" in said
    assert "shards, 0 s, for its files\n" in said
    assert run_all([*more, python("chain", MAKE, needs=("teacher",))], tmp_path, root="elsewhere")
    assert "teacher" not in capfd.readouterr().err


def test_what_time_ran_out_for_starts_again_from_nothing_or_goes_on(tmp_path):
    slow = (
        "import sys, pathlib, time; p = pathlib.Path(sys.argv[1]); p.mkdir(exist_ok=EXIST); (p /"
        " 'made').write_text('x'); time.sleep(WAIT)"
    )
    anew, on = slow.replace("EXIST", "False"), slow.replace("EXIST", "True")
    started = time.monotonic()
    jobs = [python("anew", anew.replace("WAIT", "60")), python("on", on.replace("WAIT", "60"), goes_on=True)]
    assert not run_all(jobs, tmp_path, minutes=2 / 60)
    assert time.monotonic() - started < 30
    assert (tmp_path / "runs/anew/made").exists()
    assert dict(record_in(tmp_path)) == {}
    (tmp_path / "runs/on/kept").write_text("x")
    assert run_all(
        [python("anew", anew.replace("WAIT", "0")), python("on", on.replace("WAIT", "0"), goes_on=True)],
        tmp_path,
    )
    assert (tmp_path / "runs/on/kept").exists()


def test_what_another_record_has_is_made_again_from_nothing(tmp_path):
    job = python("teacher", MAKE, goes_on=True)  # which fails where there is something
    assert run_all([job], tmp_path)
    (tmp_path / "study.jsonl").unlink()
    assert run_all([job], tmp_path)
    assert list(record_in(tmp_path)) == ["teacher"]


def test_files_of_other_lengths_are_not_read(tmp_path):
    assert run_all([python("shards", MAKE)], tmp_path)
    other = Record(tmp_path / "other.jsonl", Lengths(videos=8))
    with pytest.raises(JobError, match=r"runs with files of .*'videos': 4000.*'videos': 8.*another --out"):
        run([python("teacher", MAKE, needs=("shards",))], tmp_path / "runs", other, at_once=1, minutes=None)
    assert not (tmp_path / "runs/teacher").exists()


def test_a_job_that_is_stopped_while_it_is_repeated_is_not_taken_as_whole(tmp_path):
    slow = MAKE.replace("p.mkdir()", "p.mkdir(exist_ok=True)") + "; import time; time.sleep(WAIT)"

    def jobs(wait: int) -> list[Job]:
        teacher = python("teacher", slow.replace("WAIT", str(wait)), goes_on=True)
        return [teacher, python("student", MAKE, needs=("teacher",))]

    assert run_all(jobs(0)[:1], tmp_path)
    assert not run_all(jobs(60), tmp_path, root="elsewhere", minutes=2 / 60)
    assert run_all(jobs(0), tmp_path, root="elsewhere")
    assert (tmp_path / "elsewhere/logs/teacher.txt").read_text().count("$ python") == 2


def test_a_job_that_fails_ends_the_study_with_what_it_said(tmp_path):
    jobs = [
        python("bad", "raise SystemExit('no such shards')"),
        python("long", "import time; time.sleep(60)"),
    ]
    started = time.monotonic()
    with pytest.raises(
        JobError, match=r"(?s)bad ended with exit status 1; .*logs/bad.txt has all.*no such shards"
    ):
        run_all(jobs, tmp_path)
    assert time.monotonic() - started < 30
    assert dict(record_in(tmp_path)) == {}


def test_the_page_says_what_was_not_run(tmp_path):
    write_page(tmp_path / "page/study.md", record_in(tmp_path), LENGTHS, has_strokes=False, has_real=True)
    page = (tmp_path / "page/study.md").read_text()
    assert "pen strokes: they were not there" in page
    assert "real videos: 0 of 3 seeds have finished" in page
    assert page[page.index("## Not run") :].count("\n- ") == 9
    assert "holds**" not in page


def test_the_page_in_the_repository_is_made_from_the_record_beside_it(tmp_path):
    page = ROOT / "docs/study.md"
    record = Record(page.with_suffix(".jsonl"), LENGTHS)
    write_page(tmp_path / "study.md", record, LENGTHS, has_strokes=True, has_real=True)
    assert (tmp_path / "study.md").read_text() == page.read_text()


def test_a_comparison_of_encoders_that_learned_nothing_has_no_verdict(tmp_path):
    def probes(student: float, chance: float) -> Record:
        accuracy = {"random-init": 0.5, "teacher": 0.6, "student": student}
        accuracy |= {"ema/step-1000": 0.3, "ema/step-2000": 0.3}
        labels = {label: {"chance": chance, "num_test": 800} for label in ("digit", "motion")}
        found = {
            f"digits/seed-{seed}/base-probe.json": {
                "accuracy": {
                    run: {"motion": value + seed / 1000, "digit": 0.5} for run, value in accuracy.items()
                },
                "labels": labels,
            }
            for seed in (10, 11)
        }
        ema = {"digits/seed-10/ema": {"objective": "vjepa", "targets": None, "flops": 1.0, "steps": 2}}
        kinds = {"teacher": "vpixel", "student": "salt"}
        runs = {
            f"digits/seed-10/{run}": {"objective": kind, "targets": None, "flops": 1.0, "steps": 2}
            for run, kind in kinds.items()
        }
        (tmp_path / "study.jsonl").unlink(missing_ok=True)
        return recorded(tmp_path, found | ema | runs)

    def verdict(student: float, chance: float = 0.1) -> str:
        page = tmp_path / "study.md"
        write_page(page, probes(student, chance), LENGTHS, has_strokes=True, has_real=True)
        [row] = [line for line in page.read_text().splitlines() if line.startswith("| SALT beats the EMA")]
        return row.split(" | ")[-1]

    assert verdict(0.4) == "no verdict: neither is above random weights |"
    assert verdict(0.9, chance=0.95) == "no verdict: neither is above chance |"
    assert verdict(0.9) == "**holds**; the EMA baseline (V-JEPA 2) is not above random weights |"


def test_points_are_checkpoints_with_their_loss_and_accuracies(tmp_path):
    names = ["student/step-1", "student/step-2", "student-narrow/step-1", "student-narrow/step-2"]
    accuracy = {name: {"motion": number / 10, "digit": 0.5} for number, name in enumerate(names)}
    checkpoints = [
        {"name": name.removesuffix("/step-2"), "x": float(number)} for number, name in enumerate(names)
    ]
    folder = "digits/seed-12"
    record = recorded(
        tmp_path,
        {
            f"{folder}/base-probe.json": {"accuracy": accuracy},
            f"{folder}/select.json": {"checkpoints": checkpoints},
            f"{folder}/student": {"steps": 2},
            f"{folder}/student-narrow": {"steps": 2},
        },
    )
    points = Findings(record=record, seeds=[10, 12]).points()
    assert points == {
        12: [
            Point("student", 1, 0.0, {"motion": 0.0, "digit": 0.5}),
            Point("student", 2, 1.0, {"motion": 0.1, "digit": 0.5}),
            Point("student-narrow", 1, 2.0, {"motion": 0.2, "digit": 0.5}),
            Point("student-narrow", 2, 3.0, {"motion": 0.3, "digit": 0.5}),
        ]
    }
    assert r2([1, 2, 3], [3, 5, 7]) == pytest.approx(1)
    assert r2([1, 2, 3], [4, 4, 4]) is None


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
    record = Record(tmp_path / "page/study.jsonl", Lengths(steps=8, videos=160, probe_epochs=1))
    found = Findings(record=record, seeds=[10])
    accuracy = found.accuracies("digits", "student-third", "motion")[10]
    [row] = [line for line in page.splitlines() if line.startswith("| student-third |")]
    assert row.split(" | ")[2] == f"{accuracy:.3f}"
    assert len(found.selections()[10]["checkpoints"]) == 12
    flops = record["digits/seed-10/ema-equal-flops"].found["flops"]
    assert flops == pytest.approx(found.flops("digits", "student"), rel=0.1)
    assert "| **SALT and the EMA baseline at equal FLOPs**, seed 10 | | | | |" in page
    figures = {path.name for path in (tmp_path / "page").glob("*.png")}
    assert figures == {f"study-{name}.png" for name in ("accuracy", "compute", "loss", "decisions")}
    assert all(f"]({name})" in page for name in figures)
    saved = sharing(record)
    assert f"{saved.num_students} students of {saved.num_teachers} teachers" in page
    assert saved.num_students > saved.num_teachers
    assert saved.shared.forwards < saved.apart.forwards
