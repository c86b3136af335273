"""Writes the study's page: what was run, what was found, what was not run."""

import re
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.study import text
from benchmarks.study.experiment import Lengths
from benchmarks.study.figures import draw_accuracies, draw_compute, draw_decisions, draw_losses
from benchmarks.study.findings import (
    LABELS,
    RANDOM,
    Difference,
    Findings,
    Point,
    counterpart,
    difference,
    r2,
)
from benchmarks.study.jobs import RATE_TUNING, chosen_memories, chosen_rate, tuned_memories, tuned_rates
from benchmarks.study.record import Record
from benchmarks.study.sharing import Cost, Sharing, sharing
from salt_distill.common.whole import write_whole

LARGE = {
    "flops": "SALT and the EMA baseline at equal FLOPs",
    "sizes": "Size of the teacher, size of the student",
    "data": "What the teacher learned from",
    "masks": "The teacher's masks",
    "split": "How to split a budget of steps",
    "chain": "Chained stages: a student as the next teacher",
}
"""Experiments of `STUDY=large`, each with a probe of its own."""
NAMES = {
    RANDOM: "random weights",
    "teacher": "teacher (V-Pixel)",
    "student": "student (SALT)",
    "ema": "EMA baseline (V-JEPA 2)",
}


def write_page(path: Path, record: Record, lengths: Lengths, *, has_strokes: bool, has_real: bool) -> None:
    """Writes ``path``, and its figures beside it, from what has run so far."""
    findings = Findings(record=record, seeds=lengths.all_seeds)
    data_sets = [data for data in LABELS if findings.probes(data)]
    experiments = [name for name in LARGE if findings.probes("digits", name)]
    path.parent.mkdir(parents=True, exist_ok=True)

    def figure(name: str, title: str) -> tuple[Path, list[str]]:
        picture = path.with_name(f"{path.stem}-{name}.png")
        return picture, ["", f"![{title}]({picture.name})"]

    saved = sharing(record)
    lines = [*_opening(record, lengths, data_sets), *_claims(findings, data_sets, saved)]
    if data_sets:
        picture, shown = figure("accuracy", "accuracy of each run, a dot for each seed")
        draw_accuracies(
            picture,
            findings,
            {data: {name: title for name, title, _ in _rows(findings, data, lengths)} for data in data_sets},
        )
        lines += [*shown, "", _filled(text.DOTS)]
    if "digits" in data_sets:
        picture, shown = figure("compute", "training FLOPs against accuracy")
        draw_compute(picture, findings)
        lines += [*shown, "", _filled(text.COMPUTE)]
    lines += _tables(findings, data_sets, lengths)
    if findings.selections():
        picture, shown = figure("loss", "held-out loss against accuracy")
        draw_losses(picture, findings)
        lines += [*_selection(findings), *shown]
    if experiments:
        picture, shown = figure("decisions", "what each decision changed")
        draw_decisions(picture, findings, {name: LARGE[name] for name in experiments})
        lines += [*_large(findings, experiments), *shown, "", _filled(text.DECISIONS)]
    if saved is not None:
        lines += _sharing(saved)
    lines += _missing(findings, lengths, has_strokes=has_strokes, has_real=has_real)
    write_whole(path, "\n".join(lines) + "\n")


def _missing(findings: Findings, lengths: Lengths, *, has_strokes: bool, has_real: bool) -> Iterator[str]:
    """The parts that do not have all of their seeds."""
    parts = {
        "digits": (findings.probes("digits"), lengths.all_seeds, True),
        "pen strokes": (findings.probes("strokes"), lengths.all_seeds, has_strokes),
        "real videos": (findings.probes("real"), lengths.few_seeds, has_real),
    }
    for name, title in LARGE.items():
        parts[title] = (findings.probes("digits", name), lengths.seeds_of(name), True)
    missing = []
    for title, (probes, seeds, is_there) in parts.items():
        if not is_there and not probes:
            missing.append(f"{title}: they were not there")
        elif len(probes) < len(seeds):
            missing.append(f"{title}: {len(probes)} of {_seeds(len(seeds))} have finished")
    if missing:
        yield from ("", "## Not run", "", *(f"- {one}" for one in missing))
        yield from ("", _filled(text.NOT_RUN))


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def _opening(record: Record, lengths: Lengths, data_sets: Sequence[str]) -> Iterator[str]:
    days = sorted(entry.day for entry in record.values())
    tuned = _tuned(record, lengths) if RATE_TUNING in record else "They are not chosen yet."
    yield "# The paper's claims at small scale"
    yield ""
    yield _filled(text.OPENING)
    yield ""
    for data in data_sets:
        yield _filled(text.DATA[data], **(record["real/videos"].found if data == "real" else {}))
    yield ""
    yield _filled(
        text.SETTINGS,
        steps=", ".join(f"{lengths.of(data)} steps on {data}" for data in data_sets) or "no steps yet",
        tuned=tuned,
        videos=lengths.videos,
        passes=lengths.probe_epochs,
        days=" to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no day",
        commands=len(record),
        minutes=sum(entry.cpu_s for entry in record.values()) / 60,
        machines="; ".join(sorted({entry.machine for entry in record.values()})),
    )


def _tuned(record: Record, lengths: Lengths) -> str:
    """What the settings of the baseline gave, in a sentence each."""

    def found(accuracy: Mapping[int, float] | Mapping[str, float]) -> str:
        return ", ".join(f"{setting}: {value:.3f}" for setting, value in accuracy.items())

    again = Findings(record=record, seeds=lengths.all_seeds).accuracies("digits", "ema", "motion")
    luck = ""
    if again:
        luck = (
            f" On the seeds of the study the same setting has {_spread(list(again.values()))}, beside the"
            f" {max(tuned_rates(record).values()):.3f} for which it was chosen: a better one may exist."
        )
    return (
        f"Accuracy on motion by m was {found(tuned_memories(record))}, and with m = {chosen_memories(record)}"
        f" by rate {found(tuned_rates(record))}. So the baseline has m = {chosen_memories(record)} and the"
        f" rate {chosen_rate(record)}.{luck}"
    )


def _filled(template: str, **facts: object) -> str:
    """Paragraphs and lists in lines of 160 characters."""
    blocks = []
    for block in template.format(**facts).strip().split("\n\n"):
        items = re.split(r"\n(?=- )", block)
        blocks.append(
            "\n".join(
                textwrap.fill(
                    " ".join(item.split()),
                    160,
                    subsequent_indent="  " if item.startswith("- ") else "",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for item in items
            )
        )
    return "\n\n".join(blocks)


def _claims(findings: Findings, data_sets: Sequence[str], saved: Sharing | None) -> Iterator[str]:
    lead = _lead(findings) if "digits" in data_sets else ""
    yield from ("", "## What was found", "", _filled(text.CLAIMS, lead=lead), "")
    yield "| claim | data | difference (95% interval) | each seed | |"
    yield "|---|---|---:|---|---|"
    learned = "has learned: above random weights"
    for title, better, worse in (
        (f"the teacher {learned}", "teacher", RANDOM),
        (f"the student {learned}", "student", RANDOM),
        (f"the EMA baseline {learned}", "ema", RANDOM),
        ("a student beats its teacher (sections 5.1 and 5.3, appendix E.2)", "student", "teacher"),
        ("SALT beats the EMA baseline at equal steps, the teacher's counted (Figure 7)", "student", "ema"),
        ("the teacher alone beats the EMA baseline of twice its steps", "teacher", "ema"),
        (
            "SALT beats the EMA baseline at equal FLOPs (6ND), the teacher's counted (Figure 7)",
            "student",
            "ema-equal-flops",
        ),
        (
            "a student beats its teacher of half its depth (section 1: small teachers suffice)",
            "student-of-shallow",
            "teacher-shallow",
        ),
        (
            "a student of 6/8 of all steps beats its teacher of 2/8 (section 1: weak teachers suffice)",
            "student-6-of-8",
            "teacher-2-of-8",
        ),
        ("the same student beats a teacher that itself had 6/8", "student-6-of-8", "teacher-6-of-8"),
    ):
        for data in data_sets:
            if not findings.accuracies(data, worse, LABELS[data][0]):
                continue  # a run of digits alone, or one to come
            for label in LABELS[data]:
                yield _claim(findings, title, data, label, better, worse)
                title = ""  # stands in the first of its rows
    if points := findings.points().values():
        title = "student loss predicts accuracy (Figure 3: R² 0.951 of the training loss; here held-out loss)"
        for label in LABELS["digits"]:
            values = ", ".join(_two_digits(_r2(of, label)) for of in points)
            steps = ", ".join(_two_digits(_r2_of_steps(of, label)) for of in points)
            falls = sum(_falls(of, label) for of in points)
            yield (
                f"| {title} | digits, {label} | R² {values} |"
                f" {len(next(iter(points)))} checkpoints each; R² of the step number alone {steps} |"
                f" a lower loss goes with a higher accuracy in {falls} of {_seeds(len(points))} |"
            )
            title = ""
    if saved is not None and saved.num_students > saved.num_teachers:
        of_sharing = saved.apart.forwards / saved.shared.forwards
        of_cache = saved.uncached_forwards / saved.apart.forwards
        yield (
            "| one frozen teacher serves many students | all runs, counted |"
            f" {of_sharing:.2f} times fewer forwards by sharing, and {of_cache:.2f} times fewer by keeping"
            f" what was computed | {saved.num_students} students of {saved.num_teachers} teachers,"
            f" {saved.num_shared} of which had several |"
            " [below](#what-sharing-saved) |"
        )


def _lead(findings: Findings) -> str:
    """Over the baseline of as many steps, of the student and of its teacher."""
    student, teacher = (
        difference(*(findings.accuracies("digits", run, "motion") for run in (better, "ema"))).mean
        for better in ("student", "teacher")
    )
    return (
        f"On motion the student leads by {student:.3f} and its teacher, which trained half as long as the"
        f" baseline, by {teacher:.3f}."
    )


def _claim(findings: Findings, title: str, data: str, label: str, better: str, worse: str) -> str:
    first = findings.accuracies(data, better, label)
    second = findings.accuracies(data, worse, label)
    random = findings.accuracies(data, RANDOM, label)
    found = difference(first, second)
    chance = next(iter(findings.probes(data).values()))["labels"][label]["chance"]
    unlearned = [
        NAMES.get(run.removesuffix("-equal-flops"), run)
        for run, of in ((better, first), (worse, second))
        if RANDOM not in (better, worse) and difference(of, random).mean <= 0
    ]
    verdict = found.verdict
    if max(statistics.fmean(of.values()) for of in (first, second)) <= chance:
        verdict = "no verdict: neither is above chance"
    elif len(unlearned) == 2:
        verdict = "no verdict: neither is above random weights"
    elif unlearned:
        verdict += f"; the {unlearned[0]} is not above random weights"
    of_seeds = ", ".join(f"{one:+.3f}" for one in found.by_seed)
    return f"| {title} | {data}, {label} | {_mean(found)} | {of_seeds} | {verdict} |"


def _mean(found: Difference) -> str:
    """With its interval, if there is one."""
    interval = "" if found.interval is None else " ({:+.3f} to {:+.3f})".format(*found.interval)
    return f"{found.mean:+.3f}{interval}"


def _tables(findings: Findings, data_sets: Sequence[str], lengths: Lengths) -> Iterator[str]:
    for data in data_sets:
        probes = findings.probes(data)
        labels = next(iter(probes.values()))["labels"]
        heads = [f"{label} (chance {fact['chance']:.3f})" for label, fact in labels.items()]
        near = findings.neighbours() if data == "real" else {}
        heads += ["origin by k-NN"] if near else []
        yield from ("", f"## {data.capitalize()}", "")
        yield _filled(
            text.TABLE,
            num_seeds=_seeds(len(probes)),
            num_test=next(iter(labels.values()))["num_test"],
            clips="clips" if data == "real" else "videos",
        )
        yield ""
        yield f"| | {' | '.join(heads)} | training FLOPs | core minutes |"
        yield f"|---|{'---:|' * len(heads)}---:|---:|"
        for name, title, cost in _rows(findings, data, lengths):
            cells = [_spread(list(findings.accuracies(data, name, label).values())) for label in labels]
            if near:
                of_seeds = [found["encoders"].get(name) for found in near.values()]  # only last checkpoints
                known = [found["knn"]["origin"]["accuracy"] for found in of_seeds if found]
                cells.append(_spread(known) if known else "")
            yield f"| {title} | {' | '.join(cells)} | {cost} |"


def _rows(findings: Findings, data: str, lengths: Lengths) -> Iterator[tuple[str, str, str]]:
    """Of each row of a table the run, its title, and the two cells of its cost."""
    steps = lengths.of(data)

    def cost(run: str, share: float = 1) -> str:
        flops, minutes = findings.flops(data, run), findings.core_minutes(data, run)
        return " | " if flops is None or minutes is None else f"{share * flops:.2e} | {share * minutes:.1f}"

    yield RANDOM, NAMES[RANDOM], " | "
    yield "teacher", f"{NAMES['teacher']}, {steps} steps", cost("teacher")
    yield "student", f"{NAMES['student']}, {steps} steps", cost("student")
    yield f"ema/step-{steps}", f"{NAMES['ema']}, step {steps} of {2 * steps}", cost("ema", 1 / 2)
    yield "ema", f"{NAMES['ema']}, {2 * steps} steps", cost("ema")


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _selection(findings: Findings) -> Iterator[str]:
    yield ""
    yield "## Held-out loss and accuracy"
    yield ""
    yield _filled(text.SELECTION)
    seeds = findings.points()
    runs = list(dict.fromkeys(point.run for point in next(iter(seeds.values()))))
    heads = [
        *("seed", "motion", "digit", "motion by the step, without the loss"),
        *(f"motion, {run} alone" for run in runs),
    ]
    yield ""
    yield f"| {' | '.join(heads)} |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    for seed, points in seeds.items():
        values = [
            _r2(points, "motion"),
            _r2(points, "digit"),
            _r2_of_steps(points, "motion"),
            *(_r2([one for one in points if one.run == run], "motion") for run in runs),
        ]
        yield f"| {seed} | {' | '.join(map(_two_digits, values))} |"


def _r2(points: Sequence[Point], label: str) -> float | None:
    return r2([one.loss for one in points], [one.accuracy[label] for one in points])


def _r2_of_steps(points: Sequence[Point], label: str) -> float | None:
    return r2([one.step for one in points], [one.accuracy[label] for one in points])


def _falls(points: Sequence[Point], label: str) -> bool:
    """Whether the accuracy is higher where the loss is lower."""
    loss, accuracy = [one.loss for one in points], [one.accuracy[label] for one in points]
    return _r2(points, label) is not None and statistics.correlation(loss, accuracy) < 0


def _two_digits(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _large(findings: Findings, experiments: Sequence[str]) -> Iterator[str]:
    of_student = list(findings.accuracies("digits", "student", "motion").values())
    yield from ("", "## What else decides", "")
    yield _filled(text.LARGE, student=_spread(of_student), num_seeds=_seeds(len(of_student)))
    yield ""
    heads = ("digit", "motion", "motion minus its counterpart's (95% interval)", "training FLOPs")
    yield f"| | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * len(heads)
    for experiment in experiments:
        probes = findings.probes("digits", experiment)
        seeds = f"seed{'s' * (len(probes) > 1)} {', '.join(map(str, probes))}"
        yield f"| **{LARGE[experiment]}**, {seeds} | | | | |"
        some = Findings(record=findings.record, seeds=list(probes))
        for run in ("teacher", "student"):
            yield f"| {run}, as above{' (4-of-8)' * (experiment == 'split')} | {_cells(some, run)} |"
        for run in next(iter(probes.values()))["accuracy"]:
            yield f"| {run} | {_cells(some, run)} |"


def _cells(findings: Findings, run: str) -> str:
    """Of a row of the table of other decisions, all but the first."""
    digit, motion = (findings.accuracies("digits", run, label) for label in ("digit", "motion"))
    against = ""
    if run != counterpart(run):
        found = difference(motion, findings.accuracies("digits", counterpart(run), "motion"))
        is_clear = found.interval is not None and not found.interval[0] <= 0 <= found.interval[1]
        against = f"**{_mean(found)}**" if is_clear else _mean(found)
    accuracies = " | ".join(_spread(list(of.values())) for of in (digit, motion))
    return f"{accuracies} | {against} | {findings.flops('digits', run):.2e}"


def _sharing(found: Sharing) -> Iterator[str]:
    yield from ("", "## What sharing saved", "")
    yield _filled(
        text.SHARING,
        students=found.num_students,
        teachers=found.num_teachers,
        shared=found.num_shared,
        training=found.training_hours,
        training_apart=found.training_hours_apart,
    )
    yield ""
    yield "| | clips that teachers computed | core hours | targets kept |"
    yield "|---|---:|---:|---:|"
    for title, cost in (
        ("one cache for all students of a teacher, as it was run", found.shared),
        ("a cache for each student", found.apart),
    ):
        yield f"| {title} | {_cost(cost)} |"
    yield f"| no cache: a forward for each clip of each step | {found.uncached_forwards:,} | | none |"


def _cost(cost: Cost) -> str:
    return f"{cost.forwards:,} | {cost.hours:.2f} | {cost.num_bytes / 1e9:.2f} GB"
