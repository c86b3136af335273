"""What the study runs: real commands, each with the folder that it makes and the jobs that come before it."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NUM_TEST = 800
"""Test videos of the moving digits."""
SEEN_STEPS = 4
"""Checkpoints of a student."""
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
MEMORIES = 180
"""Steps of a baseline's run over those in which its moving average forgets: V-JEPA 2's (1 - 0.99925) x
240,000. A short run keeps the ratio: with 0.99925 itself its targets would stay close to the weights that it
began with."""
DEEP, SHALLOW = ("--set", "encoder.depth=8"), ("--set", "encoder.depth=2")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the study is."""

    seeds: int = 3
    steps: int = 1000
    """Of a teacher, and of a student, on moving digits; on pen strokes 3/5 of it."""
    videos: int = 4000
    """Training videos of moving digits."""
    probe_epochs: int = 20

    def of(self, data: str) -> int:
        """Steps of a run on a data set, a multiple of the number of checkpoints."""
        return max(
            SEEN_STEPS, (self.steps if data == "digits" else self.steps * 3 // 5) // SEEN_STEPS * SEEN_STEPS
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command."""

    name: str
    """What it makes, as a path below the study's folder."""
    command: Callable[[Path], Sequence[object]]
    """Of that folder; asked when the job starts."""
    needs: Sequence[str] = ()
    """Names of the jobs before it."""
    goes_on: bool = False
    """Whether the command continues after a kill; else it starts again, from nothing."""


@dataclass(kw_only=True)
class Experiment:
    """Runs of one seed on one data set, and the probe of their encoders."""

    data: str
    seed: int
    lengths: Lengths
    name: str = "base"
    jobs: list[Job] = field(default_factory=list)
    _probed: list[str] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """Of its runs, below the study's."""
        return f"{self.data}/seed-{self.seed}"

    def train(
        self,
        kind: str,
        name: str,
        *flags: object,
        steps: int | Callable[[Path], int],
        data: str | None = None,
        teacher: str | None = None,
        needs: Sequence[str] = (),
        checkpoints: Sequence[int] = (),
    ) -> str:
        """Adds a run, and where it is a student's the cache of its teacher's latents that it reads; gives
        back its path.

        ``data``: what it trains on, of the study's data sets. ``checkpoints``: steps whose encoders are
        probed as well; the last one always is.
        """
        out, shards = f"{self.folder}/{name}", f"{data or self.data}/shards"
        before = [shards, *needs]
        targets = None
        if teacher is not None:
            targets = f"{teacher}-targets"
            before.append(targets)
            precompute = _precompute(teacher, shards, targets, self.seed)
            self.jobs.append(Job(name=targets, needs=(shards, teacher), goes_on=True, command=precompute))

        def command(root: Path) -> list[object]:
            length = steps if isinstance(steps, int) else steps(root)
            every = length // SEEN_STEPS if checkpoints else length
            source = [] if targets is None else ["--targets", root / targets]
            schedule = [
                "--steps",
                length,
                "--keep-every",
                every,
                "--set",
                f"optim.warmup_steps={min(30, length // 2)}",
            ]
            same = ["--seed", self.seed, "--data-seed", self.seed, "--views", 1, "--workers", 0]
            resume = ["--resume"] if (root / out / "config.yaml").exists() else []
            return [
                "salt-train",
                kind,
                "--preset",
                "nano",
                "--data",
                root / shards,
                "--out",
                root / out,
                *source,
                *schedule,
                *same,
                *flags,
                *resume,
            ]

        self.jobs.append(Job(name=out, needs=tuple(before), goes_on=True, command=command))
        self._probed += [f"{out}/checkpoints/step-{step}" for step in checkpoints] or [out]
        return out

    def judge(self, *also: str) -> str:
        """Adds the probe of all runs so far and of ``also``; gives back the name of its JSON file."""
        out = f"{self.folder}/{self.name}-probe.json"
        runs = (*also, *self._probed)

        def command(root: Path) -> list[object]:
            checkpoints = [part for run in runs for part in ("--ckpt", root / run)]
            length = [
                "--epochs",
                self.lengths.probe_epochs,
                "--batch-size",
                128,
                "--seed",
                self.seed,
                "--resume",
            ]
            random = ["--random-init"] if self.name == "base" else []
            return [
                "salt-eval",
                "probe",
                *checkpoints,
                *random,
                "--data",
                root / f"{self.data}/shards",
                "--out",
                root / out,
                *length,
            ]

        needs = tuple(dict.fromkeys(run.partition("/checkpoints/")[0] for run in runs))
        self.jobs.append(Job(name=out, needs=needs, goes_on=True, command=command))
        return out


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
    experiment.train("vjepa", "ema", *momentum(2 * steps), steps=2 * steps, checkpoints=[steps, 2 * steps])
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
    return experiment.jobs


def large(seed: int, lengths: Lengths, *, strokes: bool) -> list[Job]:
    """The paper's other claims, on moving digits, around the teacher and the student of ``small``."""
    steps, base = lengths.of("digits"), f"digits/seed-{seed}"
    teacher, student = f"{base}/teacher", f"{base}/student"
    jobs: list[Job] = []

    def experiment(name: str) -> Experiment:
        return Experiment(data="digits", seed=seed, lengths=lengths, name=name)

    equal = experiment("flops")
    equal.train(
        "vjepa",
        "ema-equal-flops",
        *momentum(2 * steps),
        steps=lambda root: steps_of_equal_flops(root, base),
        needs=(teacher, student, f"{base}/ema"),
    )
    equal.judge()

    sizes = experiment("sizes")
    teachers = {"shallow": sizes.train("teacher", "teacher-shallow", *SHALLOW, steps=steps), "base": teacher}
    teachers["deep"] = sizes.train("teacher", "teacher-deep", *DEEP, steps=steps)
    for size, of in teachers.items():
        if size != "base":
            sizes.train("student", f"student-of-{size}", steps=steps, teacher=of)
        sizes.train("student", f"student-deep-of-{size}", *DEEP, steps=steps, teacher=of)
    sizes.judge()

    data = experiment("data")
    for name in ("digits-quarter", *(("strokes", "digits-and-strokes") if strokes else ())):
        of = data.train("teacher", f"teacher-on-{name}", steps=steps, data=name)
        data.train("student", f"student-of-{name}", steps=steps, teacher=of)
    data.judge()

    masks = experiment("masks")
    for mask in ("random-tube", "multi-random-tube"):
        of = masks.train("teacher", f"teacher-{mask}", "--mask", mask, steps=steps)
        masks.train("student", f"student-of-{mask}", steps=steps, teacher=of)
    masks.judge()

    split = experiment("split")
    for quarters in (1, 2, 6):
        of = split.train("teacher", f"teacher-{quarters}-of-8", steps=2 * steps * quarters // 8)
        split.train(
            "student", f"student-{8 - quarters}-of-8", steps=2 * steps * (8 - quarters) // 8, teacher=of
        )
    split.judge()

    chain = experiment("chain")
    second = chain.train("student", "student-second", steps=steps, teacher=student)
    chain.train("student", "student-third", steps=steps, teacher=second)
    chain.judge()

    for one in (equal, sizes, data, masks, split, chain):
        jobs += one.jobs
    return jobs


def momentum(steps: int) -> tuple[str, ...]:
    """Flags of a baseline whose moving average forgets after as large a part of the run as V-JEPA 2's."""
    value = max(0.0, 1 - MEMORIES / steps)
    return ("--set", f"ema.start={value}", "--set", f"ema.end={value}")


def steps_of_equal_flops(root: Path, base: str) -> int:
    """Steps of the baseline that cost what a teacher and its student cost together, by the paper's 6ND."""
    cost = {
        name: json.loads((root / base / name / "summary.json").read_text())
        for name in ("teacher", "student", "ema")
    }
    return round(
        (cost["teacher"]["flops"] + cost["student"]["flops"]) / (cost["ema"]["flops"] / cost["ema"]["steps"])
    )


def study(lengths: Lengths, *, labelled: Path | None, is_large: bool) -> list[Job]:
    """All jobs, in an order in which they may run. ``labelled``: the folder with the pen strokes, where there
    is one."""
    jobs = [*_data(lengths, labelled, is_large), *_runs(lengths, labelled, is_large)]
    return list({job.name: job for job in jobs}.values())  # students of one teacher share its latents


def _runs(lengths: Lengths, labelled: Path | None, is_large: bool) -> Iterator[Job]:
    for seed in range(lengths.seeds):
        for data in ("digits", *(("strokes",) if labelled else ())):
            yield from small(data, seed, lengths)
    if is_large:
        for seed in range(lengths.seeds):
            yield from large(seed, lengths, strokes=labelled is not None)


def _data(lengths: Lengths, labelled: Path | None, is_large: bool) -> Iterator[Job]:
    yield Job(
        name="digits/videos",
        command=lambda root: [
            "salt-data",
            "synth",
            root / "digits/videos",
            "--num-train",
            lengths.videos,
            "--num-test",
            NUM_TEST,
        ],
    )
    if labelled:
        yield Job(
            name="strokes/videos",
            command=lambda root: [
                "python",
                "-m",
                "benchmarks.study.strokes",
                labelled,
                root / "strokes/videos",
            ],
        )
    for name in ("digits", *(("strokes",) if labelled else ())):
        yield Job(name=f"{name}/shards", needs=(f"{name}/videos",), goes_on=True, command=_pack(name))
    if is_large:
        yield _mixture("digits-quarter", {"digits": lengths.videos // 4})
        if labelled:
            yield _mixture("digits-and-strokes", {"digits": None, "strokes": None})


def _pack(name: str) -> Callable[[Path], list[object]]:
    return lambda root: ["salt-data", "pack", root / f"{name}/videos", root / f"{name}/shards"]


def _precompute(teacher: str, shards: str, targets: str, seed: int) -> Callable[[Path], list[object]]:
    return lambda root: [
        *(
            "salt-serve",
            "precompute",
            "--ckpt",
            root / teacher,
            "--data",
            root / shards,
            "--views",
            1,
            "--data-seed",
            seed,
            "--workers",
            0,
        ),
        *("--out", root / targets),
    ]


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
