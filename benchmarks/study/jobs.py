"""What the study runs: real commands, each with the folder that it makes and the jobs that come before it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.study.experiment import SEEN_STEPS, Experiment, Job, Lengths

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


def small(data: str, seed: int, lengths: Lengths) -> list[Job]:
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
        *momentum(2 * steps),
        *(() if data == "real" else rate()),  # the recipe of real videos has its own
        steps=2 * steps,
        needs=(RATE_TUNING,),
        checkpoints=[steps, 2 * steps],
    )
    probe = experiment.judge()
    if data == "digits":
        out = f"{experiment.folder}/select.json"

        def select(root: Path) -> list[object]:
            of = [
                "--teacher",
                root / teacher,
                "--data",
                root / f"{data}/shards",
                "--probe",
                root / probe,
                "--label",
                "motion",
            ]
            return [
                "salt-eval",
                "select",
                *(root / student for student in students),
                *of,
                "--out",
                root / out,
            ]

        experiment.jobs.append(Job(name=out, needs=(probe,), command=select))
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

    return Job(name=f"{folder}/neighbours.json", needs=runs, command=command)


def large(seed: int, lengths: Lengths, *, strokes: bool) -> list[Job]:
    """The paper's other claims, on moving digits, around the teacher and the student of ``small``."""
    steps, base = lengths.of("digits"), f"digits/seed-{seed}"
    teacher, student = f"{base}/teacher", f"{base}/student"
    compared = (f"{base}/base-probe.json",)  # has the student that the others are held against
    jobs: list[Job] = []

    def experiment(name: str) -> Experiment:
        return Experiment(data="digits", seed=seed, lengths=lengths, name=name)

    equal = experiment("flops")
    equal.train(
        "vjepa",
        "ema-equal-flops",
        *momentum(lambda root: steps_of_equal_flops(root, base)),
        *rate(),
        steps=lambda root: steps_of_equal_flops(root, base),
        needs=(teacher, student, f"{base}/ema"),
    )
    equal.judge(compared)

    sizes = experiment("sizes")
    teachers = {"shallow": sizes.train("teacher", "teacher-shallow", *SHALLOW, steps=steps), "base": teacher}
    teachers["deep"] = sizes.train("teacher", "teacher-deep", *DEEP, steps=steps)
    for size, of in teachers.items():
        if size != "base":
            sizes.train("student", f"student-of-{size}", steps=steps, teacher=of)
        sizes.train("student", f"student-deep-of-{size}", *DEEP, steps=steps, teacher=of)
    sizes.judge(compared)

    data = experiment("data")
    for name in ("digits-quarter", *(("strokes", "digits-and-strokes") if strokes else ())):
        of = data.train("teacher", f"teacher-on-{name}", steps=steps, data=name)
        data.train("student", f"student-of-{name}", steps=steps, teacher=of)
    data.judge(compared)

    masks = experiment("masks")
    for mask in ("random-tube", "multi-random-tube"):
        of = masks.train("teacher", f"teacher-{mask}", "--mask", mask, steps=steps)
        masks.train("student", f"student-of-{mask}", steps=steps, teacher=of)
    masks.judge(compared)

    split = experiment("split")
    for quarters in (1, 2, 6):
        of = split.train("teacher", f"teacher-{quarters}-of-8", steps=2 * steps * quarters // 8)
        split.train(
            "student", f"student-{8 - quarters}-of-8", steps=2 * steps * (8 - quarters) // 8, teacher=of
        )
    split.judge(compared)

    chain = experiment("chain")
    second = chain.train("student", "student-second", steps=steps, teacher=student, generation=2)
    chain.train("student", "student-third", steps=steps, teacher=second, generation=3)
    chain.judge(compared)

    for one in (equal, sizes, data, masks, split, chain):
        jobs += one.jobs
    return jobs


def tuning(lengths: Lengths) -> list[Job]:
    """The baseline with each momentum of ``MEMORIES``, then with the best one and each rate of ``RATES``, and
    what its encoders know of motion."""
    momenta, rates = (
        Experiment(data="digits", seed=TUNING_SEED, lengths=lengths, name=name)
        for name in ("tuning", "rates")
    )
    steps = 2 * lengths.of("digits")
    for memories in MEMORIES:
        momenta.train(
            "vjepa", f"ema-{memories}", *momentum(steps, lambda _, value=memories: value), steps=steps
        )
    for name in list(RATES)[1:]:  # with the preset's rate it has run
        flags = (*momentum(steps), *rate(lambda _, value=name: value))
        rates.train("vjepa", f"ema-rate-{name}", *flags, steps=steps, needs=(TUNING,))
    assert (momenta.judge(), rates.judge()) == (TUNING, RATE_TUNING)
    return momenta.jobs + rates.jobs


def tuned_memories(root: Path) -> dict[int, float]:
    """Accuracy on motion of the baseline with each of ``MEMORIES``, on the seed that is for this alone."""
    accuracy = json.loads((root / TUNING).read_text())["accuracy"]
    return {memories: accuracy[f"ema-{memories}"]["motion"] for memories in MEMORIES}


def tuned_rates(root: Path) -> dict[str, float]:
    """The same with each of ``RATES`` and the best momentum."""
    accuracy = json.loads((root / RATE_TUNING).read_text())["accuracy"]
    preset, *others = RATES
    return {preset: max(tuned_memories(root).values())} | {
        name: accuracy[f"ema-rate-{name}"]["motion"] for name in others
    }


def chosen_memories(root: Path) -> int:
    """The setting of ``MEMORIES`` whose encoder tells motion best."""
    accuracy = tuned_memories(root)
    return max(accuracy, key=accuracy.__getitem__)


def chosen_rate(root: Path) -> str:
    """The same of ``RATES``."""
    accuracy = tuned_rates(root)
    return max(accuracy, key=accuracy.__getitem__)


def rate(name: Callable[[Path], str] = chosen_rate) -> tuple[object, ...]:
    """Flags of a baseline with a learning rate of ``RATES``."""

    def flag(key: str, value: Callable[[tuple[float, float]], float]) -> Callable[[Path], str]:
        return lambda root: f"optim.{key}={value(RATES[name(root)]):g}"

    return (
        *("--set", flag("lr", lambda rates: rates[0])),
        *("--set", flag("start_lr", lambda rates: rates[0] / 10)),
        *("--set", flag("final_lr", lambda rates: rates[1])),
    )


def momentum(
    steps: int | Callable[[Path], int], memories: Callable[[Path], int] = chosen_memories
) -> tuple[object, ...]:
    """Flags of a baseline of so many steps whose moving average forgets ``memories`` times in them."""

    def flag(key: str) -> Callable[[Path], str]:
        def value(root: Path) -> str:
            length = steps if isinstance(steps, int) else steps(root)
            return f"ema.{key}={max(0.0, 1 - memories(root) / length)}"

        return value

    return ("--set", flag("start"), "--set", flag("end"))


def steps_of_equal_flops(root: Path, base: str) -> int:
    """Steps of the baseline that cost what a teacher and its student cost together, by the paper's 6ND."""
    cost = {
        name: json.loads((root / base / name / "summary.json").read_text())
        for name in ("teacher", "student", "ema")
    }
    return round(
        (cost["teacher"]["flops"] + cost["student"]["flops"]) / (cost["ema"]["flops"] / cost["ema"]["steps"])
    )


def study(lengths: Lengths, *, labelled: Path | None, real: Path | None, is_large: bool) -> list[Job]:
    """All jobs, in an order in which they may run. ``labelled``: the folder with the pen strokes; ``real``: a
    folder of real videos, for the large study; each where there is one."""
    real = real if is_large else None
    jobs = [*_data(lengths, labelled, real, is_large), *_runs(lengths, labelled, real, is_large)]
    return list({job.name: job for job in jobs}.values())  # students of one teacher share its latents


def _runs(lengths: Lengths, labelled: Path | None, real: Path | None, is_large: bool) -> Iterator[Job]:
    yield from tuning(lengths)
    for seed in lengths.all_seeds:
        yield from small("digits", seed, lengths)
    if is_large:
        for seed in lengths.few_seeds:
            yield from large(seed, lengths, strokes=labelled is not None)
    for data in (*(("strokes",) if labelled else ()), *(("real",) if real else ())):
        for seed in lengths.few_seeds:
            yield from small(data, seed, lengths)


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
        )
    for name in ("digits", *(("strokes",) if labelled else ()), *(("real",) if real else ())):
        yield Job(name=f"{name}/shards", needs=(f"{name}/videos",), goes_on=True, command=_pack(name))
    if is_large:
        yield _mixture("digits-quarter", {"digits": lengths.videos // 4})
        if labelled:
            yield _mixture("digits-and-strokes", {"digits": None, "strokes": None})


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
