"""What the study runs: real commands, each with the folder that it makes and the jobs that come before it."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.study.experiment import SEEN_STEPS, Experiment, Job, Lengths, found_in_json
from benchmarks.study.record import Record

NUM_TEST = 800
"""Test videos of the moving digits, and most of the real ones."""
STUDENTS = {
    "student": (),
    "student-shallow": ("--set", "encoder.depth=2"),
    "student-narrow": (
        "--set",
        "encoder.width=48",
        "--set",
        "encoder.num_heads=2",
        "--set",
        "encoder.mlp_width=192",
    ),
}
"""Students of one teacher, whose losses are held against their accuracies (Figure 3). The first has its
teacher's size, as the teachers of the claims."""
MEMORIES = (6, 20, 60, 180, 540)
"""Settings of the baseline's momentum: steps of its run over those in which its moving average forgets.
V-JEPA 2's is (1 - 0.99925) x 240,000 = 180; with 0.99925 itself the targets of a short run would stay close
to the weights that it began with."""
RATES = {
    "0.001": (1e-3, 1e-3),
    "0.003-to-0.002": (3e-3, 2e-3),
    "0.001-to-0.0001": (1e-3, 1e-4),
    "0.0005": (5e-4, 5e-4),
}
"""First and last learning rates that the preset's, the first one, was chosen among (docs/appearance.md): the
baseline gets the same choice. It starts at a tenth of the first."""
TUNING_SEED = 100
"""Of the runs that choose the baseline's momentum and then its rate; no other run has it."""
TUNING, RATE_TUNING = (f"digits/seed-{TUNING_SEED}/{name}-probe.json" for name in ("tuning", "rates"))
DEEP, SHALLOW = ("--set", "encoder.depth=8"), ("--set", "encoder.depth=2")


def small(data: str, seed: int, lengths: Lengths, record: Record) -> list[Job]:
    """A teacher, its students, the baseline; on moving digits students of three sizes."""
    experiment, steps = Experiment(data=data, seed=seed, lengths=lengths), lengths.of(data)
    teacher = experiment.train("teacher", "teacher", steps=steps)
    seen = [steps * number // SEEN_STEPS for number in range(1, SEEN_STEPS + 1)]
    sizes = STUDENTS if data == "digits" else {"student": ()}
    students = [
        experiment.train(
            "student",
            name,
            *flags,
            steps=steps,
            teacher=teacher,
            checkpoints=seen if data == "digits" else (),
        )
        for name, flags in sizes.items()
    ]
    experiment.train(
        "vjepa",
        "ema",
        *momentum(2 * steps, lambda: chosen_memories(record)),
        *(() if data == "real" else rate(lambda: chosen_rate(record))),  # that recipe has its own
        steps=2 * steps,
        after=(RATE_TUNING,),
        checkpoints=[steps, 2 * steps],
    )
    probe = experiment.judge()
    if data == "digits":
        out = f"{experiment.folder}/select.json"

        def select(root: Path) -> list[object]:
            of = ("--teacher", root / teacher, "--data", root / f"{data}/shards")
            judged = ("--probe", root / probe, "--label", "motion", "--out", root / out)
            return ["salt-eval", "select", *(root / student for student in students), *of, *judged]

        needs = (f"{data}/shards", teacher, *students, probe)
        experiment.jobs.append(Job(name=out, needs=needs, command=select, found=found_in_json))
    if data == "real":
        experiment.jobs.append(_neighbours(experiment.folder, seed))
    return experiment.jobs


def _neighbours(folder: str, seed: int) -> Job:
    """k-NN accuracy of the last checkpoints of a teacher, its student and the baseline, and of random
    weights."""
    runs = [f"{folder}/{name}" for name in ("teacher", "student", "ema")]

    def command(root: Path) -> list[object]:
        checkpoints = [part for run in runs for part in ("--ckpt", root / run)]
        out = ("--data", root / "real/shards", "--out", root / folder / "neighbours.json")
        return ["salt-eval", "rank", *checkpoints, "--random-init", "--seed", seed, *out]

    return Job(
        name=f"{folder}/neighbours.json", needs=("real/shards", *runs), command=command, found=found_in_json
    )


def large(seed: int, lengths: Lengths, record: Record, *, strokes: bool) -> list[Job]:
    """The experiments that have this seed, on moving digits, around the teacher, the student and the baseline
    of ``small``. ``strokes``: whether there are pen strokes for teachers."""
    jobs: list[Job] = []
    for name, add in {
        "flops": lambda of: _equal_flops(of, record),
        "sizes": _sizes,
        "data": lambda of: _teacher_data(of, strokes=strokes),
        "masks": _masks,
        "split": _split,
        "chain": _chain,
    }.items():
        if seed in lengths.seeds_of(name):
            experiment = Experiment(data="digits", seed=seed, lengths=lengths, name=name)
            add(experiment)
            experiment.judge((f"{experiment.folder}/base-probe.json",))  # has what its runs are held against
            jobs += experiment.jobs
    return jobs


def _equal_flops(experiment: Experiment, record: Record) -> None:
    base = experiment.folder
    experiment.train(
        "vjepa",
        "ema-equal-flops",
        *momentum(lambda: steps_of_equal_flops(record, base), lambda: chosen_memories(record)),
        *rate(lambda: chosen_rate(record)),
        steps=lambda: steps_of_equal_flops(record, base),
        after=(f"{base}/teacher", f"{base}/student", f"{base}/ema", RATE_TUNING),
    )


def _sizes(experiment: Experiment) -> None:
    steps = experiment.lengths.of("digits")
    shallow, deep = (
        experiment.train("teacher", f"teacher-{size}", *flags, steps=steps)
        for size, flags in (("shallow", SHALLOW), ("deep", DEEP))
    )
    base = f"{experiment.folder}/teacher"
    experiment.train("student", "student-of-shallow", steps=steps, teacher=shallow)
    experiment.train("student", "student-deep-of-shallow", *DEEP, steps=steps, teacher=shallow)
    experiment.train("student", "student-deep-of-base", *DEEP, steps=steps, teacher=base)
    experiment.train("student", "student-of-deep", steps=steps, teacher=deep)
    experiment.train("student", "student-deep-of-deep", *DEEP, steps=steps, teacher=deep)


def _teacher_data(experiment: Experiment, *, strokes: bool) -> None:
    steps = experiment.lengths.of("digits")
    for name in ("digits-quarter", *(("strokes", "digits-and-strokes") if strokes else ())):
        of = experiment.train("teacher", f"teacher-on-{name}", steps=steps, data=name)
        experiment.train("student", f"student-of-{name}", steps=steps, teacher=of)


def _masks(experiment: Experiment) -> None:
    steps = experiment.lengths.of("digits")
    for mask in ("random-tube", "multi-random-tube"):
        of = experiment.train("teacher", f"teacher-{mask}", "--mask", mask, steps=steps)
        experiment.train("student", f"student-of-{mask}", steps=steps, teacher=of)


def _split(experiment: Experiment) -> None:
    budget = 2 * experiment.lengths.of("digits")
    for share in (1, 2, 6):
        rest = 8 - share
        of = experiment.train("teacher", f"teacher-{share}-of-8", steps=budget * share // 8)
        experiment.train("student", f"student-{rest}-of-8", steps=budget * rest // 8, teacher=of)


def _chain(experiment: Experiment) -> None:
    steps, first = experiment.lengths.of("digits"), f"{experiment.folder}/student"
    second = experiment.train("student", "student-second", steps=steps, teacher=first, generation=2)
    experiment.train("student", "student-third", steps=steps, teacher=second, generation=3)


def tuning(lengths: Lengths, record: Record) -> list[Job]:
    """The baseline with each momentum of ``MEMORIES``, then with the best one and each rate of ``RATES``, and
    what its encoders know of motion."""
    momenta, rates = (
        Experiment(data="digits", seed=TUNING_SEED, lengths=lengths, name=name)
        for name in ("tuning", "rates")
    )
    steps = 2 * lengths.of("digits")
    for memories in MEMORIES:
        flags = momentum(steps, lambda value=memories: value)
        momenta.train("vjepa", f"ema-{memories}", *flags, steps=steps)
    for name in list(RATES)[1:]:  # with the preset's rate it has run
        flags = (*momentum(steps, lambda: chosen_memories(record)), *rate(lambda value=name: value))
        rates.train("vjepa", f"ema-rate-{name}", *flags, steps=steps, after=(TUNING,))
    assert (momenta.judge(), rates.judge()) == (TUNING, RATE_TUNING)
    return momenta.jobs + rates.jobs


def tuned_memories(record: Record) -> dict[int, float]:
    """Accuracy on motion of the baseline with each of ``MEMORIES``, on the seed that is for this alone."""
    accuracy = record[TUNING].found["accuracy"]
    return {memories: accuracy[f"ema-{memories}"]["motion"] for memories in MEMORIES}


def tuned_rates(record: Record) -> dict[str, float]:
    """The same with each of ``RATES`` and the best momentum."""
    accuracy = record[RATE_TUNING].found["accuracy"]
    preset, *others = RATES
    return {preset: max(tuned_memories(record).values())} | {
        name: accuracy[f"ema-rate-{name}"]["motion"] for name in others
    }


def chosen_memories(record: Record) -> int:
    """The setting of ``MEMORIES`` whose encoder tells motion best."""
    accuracy = tuned_memories(record)
    return max(accuracy, key=accuracy.__getitem__)


def chosen_rate(record: Record) -> str:
    """The same of ``RATES``."""
    accuracy = tuned_rates(record)
    return max(accuracy, key=accuracy.__getitem__)


def rate(name: Callable[[], str]) -> tuple[object, ...]:
    """Flags of a baseline with a learning rate of ``RATES``."""

    def flag(key: str, value: Callable[[tuple[float, float]], float]) -> Callable[[], str]:
        return lambda: f"optim.{key}={value(RATES[name()]):g}"

    return (
        *("--set", flag("lr", lambda rates: rates[0])),
        *("--set", flag("start_lr", lambda rates: rates[0] / 10)),
        *("--set", flag("final_lr", lambda rates: rates[1])),
    )


def momentum(steps: int | Callable[[], int], memories: Callable[[], int]) -> tuple[object, ...]:
    """Flags of a baseline of so many steps whose moving average forgets ``memories`` times in them."""

    def flag(key: str) -> Callable[[], str]:
        def value() -> str:
            length = steps if isinstance(steps, int) else steps()
            return f"ema.{key}={max(0.0, 1 - memories() / length)}"

        return value

    return ("--set", flag("start"), "--set", flag("end"))


def steps_of_equal_flops(record: Record, base: str) -> int:
    """Steps of the baseline that cost what a teacher and its student cost together, by the paper's 6ND."""
    cost = {name: record[f"{base}/{name}"].found for name in ("teacher", "student", "ema")}
    return round(
        (cost["teacher"]["flops"] + cost["student"]["flops"]) / (cost["ema"]["flops"] / cost["ema"]["steps"])
    )


def study(
    lengths: Lengths, record: Record, *, labelled: Path | None, real: Path | None, is_large: bool
) -> list[Job]:
    """All jobs, in an order in which they may run. ``record``: what has been found when they run.
    ``labelled``: the folder with the pen strokes; ``real``: a folder of real videos, for the large study;
    each where there is one."""
    real = real if is_large else None
    jobs = [*_data(lengths, labelled, real, is_large), *_runs(lengths, record, labelled, real, is_large)]
    return list({job.name: job for job in jobs}.values())  # students of one teacher share its latents


def _runs(
    lengths: Lengths, record: Record, labelled: Path | None, real: Path | None, is_large: bool
) -> Iterator[Job]:
    yield from tuning(lengths, record)
    for seed in lengths.all_seeds:
        yield from small("digits", seed, lengths, record)
    for seed in lengths.all_seeds if labelled else ():
        yield from small("strokes", seed, lengths, record)
    for seed in lengths.all_seeds if is_large else ():
        yield from large(seed, lengths, record, strokes=labelled is not None)
    for seed in lengths.few_seeds if real else ():  # last: a seed takes twice as long as one of the others
        jobs = small("real", seed, lengths, record)
        yield from sorted(jobs, key=lambda job: not job.name.endswith("/ema"))  # first: it takes longest


def _data(lengths: Lengths, labelled: Path | None, real: Path | None, is_large: bool) -> Iterator[Job]:
    digits = ("--num-train", lengths.videos, "--num-test", NUM_TEST)
    yield Job(
        name="digits/videos", command=lambda root: ["salt-data", "synth", root / "digits/videos", *digits]
    )
    if labelled:
        strokes = ("python", "-m", "benchmarks.study.strokes", labelled)
        yield Job(name="strokes/videos", command=lambda root: [*strokes, root / "strokes/videos"])
    if real:
        clips = ("--num-pretrain", lengths.videos, "--num-train", lengths.videos, "--num-test", NUM_TEST)
        yield Job(
            name="real/videos",
            command=lambda root: ["salt-data", "pretext", real, root / "real/videos", *clips],
            found=_found_in_clips,
        )
    for name in ("digits", *(("strokes",) if labelled else ()), *(("real",) if real else ())):
        yield Job(name=f"{name}/shards", needs=(f"{name}/videos",), goes_on=True, command=_pack(name))
    if is_large:
        yield _mixture("digits-quarter", {"digits": lengths.videos // 4})
        if labelled:
            yield _mixture("digits-and-strokes", {"digits": None, "strokes": None})


def _found_in_clips(made: Path) -> dict[str, Any]:
    """Of how many videos there are clips, and of how many in the test split."""
    with (made / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    in_test = {row["origin"] for row in rows if row["split"] == "test"}
    return {"num_videos": len({row["origin"] for row in rows}), "num_test_videos": len(in_test)}


def _pack(name: str) -> Callable[[Path], list[object]]:
    return lambda root: ["salt-data", "pack", root / f"{name}/videos", root / f"{name}/shards"]


def _mixture(name: str, counts: dict[str, int | None]) -> Job:
    def command(root: Path) -> list[object]:
        recipe = root / f"{name}.yaml"
        sources = [
            {"name": source, "path": str((root / source / "shards").resolve())}
            | ({} if count is None else {"count": count})
            for source, count in counts.items()
        ]
        recipe.write_text(json.dumps({"name": name, "sources": sources}))  # JSON is YAML
        return ["salt-data", "mix", recipe, root / f"{name}/shards"]

    return Job(name=f"{name}/shards", needs=tuple(f"{source}/shards" for source in counts), command=command)
