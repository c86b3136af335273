"""The commands of one experiment: its runs and the probe of their encoders."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIRST_SEED = 10
"""Seeds 0 to 3 took part in the choice of the learning rate of `nano` (docs/appearance.md)."""
SEEN_STEPS = 4
"""Checkpoints of a student."""
PROBE_LR = 0.003
"""With 0.001 a probe of 20 passes ends before it has found what trained encoders hold of digits
(docs/appearance.md)."""
CLIPS = {
    "digits": ("--views", 1),
    "strokes": ("--views", 1),
    "real": ("--split", "pretrain", "--views", 4),
}
"""Flags of every run on a data set, and of the caches of its teachers."""
RECIPES = {
    "digits": ("--preset", "nano"),
    "strokes": ("--preset", "nano"),
    # ViT-Ti at 64 pixels. Of the 16 frames of a clip every second is seen; they give 4 x 4 x 4 tokens. The
    # predictor is as weak against its encoder as that of `nano`; the rate is that of a short run.
    "real": (
        *("--preset", "tiny", "--batch-size", 24),
        *("--set", "view.crop_size=64", "--set", "view.num_frames=8", "--set", "view.frame_step=2"),
        *("--set", "view.scale=[0.6, 1.0]", "--set", "predictor.depth=2"),
        *("--set", "optim.lr=1e-3", "--set", "optim.start_lr=1e-4", "--set", "optim.final_lr=1e-5"),
        *("--set", "optim.final_weight_decay=0.04", "--set", "optim.clip_grad=1.0"),
        *("--set", "loader.frame_cache_bytes=1_000_000_000", "--set", "loader.decode_processes=0"),
    ),
}
"""Flags of every run on a data set, beside ``CLIPS``."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the study is."""

    seeds: int = 5
    """Of teacher, student, baseline and held-out loss, on digits and pen strokes, and of the other
    experiments on the paper's first claims."""
    large_seeds: int = 3
    """Of all other experiments, and of real videos."""
    steps: int = 1000
    """Of a teacher, and of a student, on moving digits; on pen strokes 3/5 of it, on real videos twice as
    many."""
    videos: int = 4000
    """Training videos of moving digits; of real ones most that encoders learn from, and that probes do."""
    probe_epochs: int = 20

    @property
    def all_seeds(self) -> range:
        return range(FIRST_SEED, FIRST_SEED + self.seeds)

    @property
    def few_seeds(self) -> range:
        return self.all_seeds[: self.large_seeds]

    def seeds_of(self, experiment: str) -> range:
        """Of an experiment of the large study. The first claims (section 1) are that small and short-trained
        teachers suffice, and that less compute does."""
        return self.all_seeds if experiment in ("flops", "sizes", "split") else self.few_seeds

    def of(self, data: str) -> int:
        """Steps of a run on a data set, a multiple of the number of checkpoints."""
        steps = {"digits": self.steps, "strokes": self.steps * 3 // 5, "real": 2 * self.steps}[data]
        return max(SEEN_STEPS, steps // SEEN_STEPS * SEEN_STEPS)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command."""

    name: str
    """What it makes, as a path below the study's folder."""
    command: Callable[[Path], Sequence[object]]
    """Of that folder; asked when the job starts."""
    found: Callable[[Path], dict[str, Any]] = lambda made: {}
    """What is worth keeping of what it made, asked with its path when the job has ended."""
    needs: Sequence[str] = ()
    """Names of the jobs whose files it reads."""
    after: Sequence[str] = ()
    """Names of the jobs of which it only asks what they found."""
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
        steps: int | Callable[[], int],
        data: str | None = None,
        teacher: str | None = None,
        generation: int | None = None,
        after: Sequence[str] = (),
        checkpoints: Sequence[int] = (),
    ) -> str:
        """Adds a run, and where it is a student's the cache of its teacher's latents that it reads; gives
        back its path.

        ``flags``: of `salt-train`; a function is called when the run starts. ``after``: as that of a job.
        ``data``: what it trains on, of the study's data sets. ``generation``: how many teachers come before
        it; without it 0, or 1 with ``teacher``. ``checkpoints``: steps whose encoders are probed as well; the
        last one always is.
        """
        out, shards = f"{self.folder}/{name}", f"{data or self.data}/shards"
        needs = [shards]
        # With its teacher's seed and size a student would begin with the weights that its teacher began with.
        seed = self.seed + 1000 * (int(teacher is not None) if generation is None else generation)
        targets = None
        if teacher is not None:
            targets = f"{teacher}-targets"
            needs.append(targets)
            precompute = _precompute(teacher, shards, targets, self.seed, CLIPS[self.data])
            self.jobs.append(
                Job(
                    name=targets,
                    needs=(shards, teacher),
                    goes_on=True,
                    command=precompute,
                    found=_found_in_targets,
                )
            )

        def command(root: Path) -> list[object]:
            length = steps if isinstance(steps, int) else steps()
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
            same = ["--seed", seed, "--data-seed", self.seed, "--workers", 0]
            resume = ["--resume"] if (root / out / "config.yaml").exists() else []
            return [
                "salt-train",
                kind,
                *RECIPES[self.data],
                *CLIPS[self.data],
                "--data",
                root / shards,
                "--out",
                root / out,
                *source,
                *schedule,
                *same,
                *(flag() if callable(flag) else flag for flag in flags),
                *resume,
            ]

        def found(made: Path) -> dict[str, Any]:
            summary = json.loads((made / "summary.json").read_text())
            names = ("objective", "steps", "batch_size", "flops", "loss_last")
            return {name: summary[name] for name in names} | {"targets": targets}

        self.jobs.append(
            Job(name=out, needs=tuple(needs), after=tuple(after), goes_on=True, command=command, found=found)
        )
        self._probed += [f"{out}/checkpoints/step-{step}" for step in checkpoints] or [out]
        return out

    def judge(self, after: Sequence[str] = ()) -> str:
        """Adds the probe of all runs so far; gives back the name of its JSON file. ``after``: as that of a
        job."""
        out, runs = f"{self.folder}/{self.name}-probe.json", tuple(self._probed)

        def command(root: Path) -> list[object]:
            checkpoints = [part for run in runs for part in ("--ckpt", root / run)]
            length = [
                "--epochs",
                self.lengths.probe_epochs,
                "--lr",
                PROBE_LR,
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

        before = dict.fromkeys((f"{self.data}/shards", *(run.partition("/checkpoints/")[0] for run in runs)))
        self.jobs.append(
            Job(
                name=out,
                needs=tuple(before),
                after=tuple(after),
                goes_on=True,
                command=command,
                found=_found_in_probe,
            )
        )
        return out


def found_in_json(made: Path) -> dict[str, Any]:
    """All of a JSON file."""
    return json.loads(made.read_text())


def _found_in_probe(made: Path) -> dict[str, Any]:
    """What the page needs of it, and what it was measured on; the whole of it is three times as large."""
    found = json.loads(made.read_text())
    return {name: found[name] for name in ("accuracy", "labels", "protocol", "index_hash")}


def _found_in_targets(made: Path) -> dict[str, Any]:
    files = json.loads((made / "manifest.json").read_text())["files"]
    return {
        "rows": sum(of["rows"] for of in files.values()),
        "num_bytes": sum(path.stat().st_size for path in made.rglob("*") if path.is_file()),
    }


def _precompute(
    teacher: str, shards: str, targets: str, seed: int, clips: Sequence[object]
) -> Callable[[Path], list[object]]:
    how = ("--data-seed", seed, "--workers", 0, *clips)

    def command(root: Path) -> list[object]:
        paths = ("--ckpt", root / teacher, "--data", root / shards, "--out", root / targets)
        return ["salt-serve", "precompute", *paths, *how]

    return command
