"""Finished runs with what was measured of them, joined by the fingerprints of their weights."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from salt_distill.common.config import PRESETS, EncoderConfig, TableConfig
from salt_distill.common.data.index_table import DatasetInfo
from salt_distill.common.folders.folder import Folder
from salt_distill.common.model.checkpoint import POINTER, read_config
from salt_distill.student_trainer.evaluation.finished_runs import FinishedRun, find_finished
from salt_distill.student_trainer.evaluation.physics.results import PhysicsResults
from salt_distill.student_trainer.evaluation.probe.results import ProbeResults, chosen_label
from salt_distill.student_trainer.evaluation.report.lineage import teachers_among, training_flops


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run learned from."""

    name: str
    num_samples: int | None
    """Of the split that was learned from; None where the data set is not at hand."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """A run, where it stands among the others, and its numbers."""

    run: FinishedRun
    size: str
    """Of its encoder: ViT-L."""
    teachers: "Sequence[MeasuredRun | None]"
    """For each frozen teacher the run that it is of; None where that is not among the runs."""
    data: TrainingData
    flops: float | None
    """6ND of the run and of all that it learned from; None where one of these is not among the runs, or began
    with trained weights."""
    scores: Mapping[str, float]
    """By benchmark: shares of 1."""

    @property
    def steps(self) -> list[int]:
        """Of every training of the chain, its own at last."""
        return [one.run.results.steps for one in self.chain]

    @property
    def chain(self) -> "list[MeasuredRun]":
        """All trainings that are among the runs, the first stage 1 first and its own at last, each once."""
        before = [one for teacher in self.teachers if teacher is not None for one in teacher.chain]
        return list({one.run.name: one for one in [*before, self]}.values())

    @property
    def is_whole(self) -> bool:
        """Whether all that it learned from is among the runs."""
        return self.flops is not None


@dataclass(frozen=True, kw_only=True)
class OtherEncoder:
    """What was measured and is none of the runs."""

    name: str
    """Of the file that it is from."""
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that the tables are made of."""

    runs: Sequence[MeasuredRun]
    others: Sequence[OtherEncoder]
    remarks: Sequence[str]
    """What is not in the tables, and why."""


def measure(config: TableConfig) -> Measured:
    """Reads runs and results. Raises ValueError where a benchmark has several data sets, protocols or numbers
    of one encoder."""
    runs, unfinished = find_finished(config.run_dirs, None if config.runs is None else Path(config.runs))
    known = {run.fingerprint for run in runs}
    scores, names, left_out = _Scores(), dict[str, str](), list[str]()
    for benchmark, path in config.probes:
        left_out += _add_probe(scores, benchmark, path, config.label, known)
    for path in config.physics:
        results = PhysicsResults.read(Path(path))
        if results.run_fingerprint not in known:
            names.setdefault(results.run_fingerprint, Path(path).stem)
            if config.layout == "runs":
                left_out.append(path)
        scores.add(
            results.benchmark,
            results.run_fingerprint,
            results.best_context["average"],
            source=(results.index_hash, results.protocol),
            path=path,
        )
    measured = _with_scores(runs, scores)
    return Measured(
        runs=measured,
        others=[
            OtherEncoder(name=name, scores=scores.of(fingerprint)) for fingerprint, name in names.items()
        ],
        remarks=[
            *(f"{path.name} is not in the tables: it has not finished." for path in unfinished),
            *(
                f"{name} is not in the tables: it is of none of the runs' newest checkpoints."
                for name in left_out
            ),
            *(
                f"The teacher of {run.run.name} is not among the runs: give its run directory too."
                for run in measured
                if None in run.teachers
            ),
            *(
                f"Nothing was measured of {run.run.name}'s newest checkpoint."
                for run in measured
                if not run.scores
            ),
        ],
    )


class _Scores:
    """By benchmark and fingerprint, each once, all of a benchmark from one data set by one protocol."""

    def __init__(self) -> None:
        self._scores: dict[tuple[str, str], float] = {}
        self._sources: dict[str, tuple[tuple[str, str], str]] = {}

    def add(
        self, benchmark: str, fingerprint: str, score: float, *, source: tuple[str, str], path: str
    ) -> None:
        """``source``: hash of the clips, and the protocol."""
        first, first_path = self._sources.setdefault(benchmark, (source, path))
        if first != source:
            what = "clips" if first[0] != source[0] else f"protocol: {source[1]}"
            raise ValueError(
                f"{path}: got another {what} for {benchmark}, expected those of {first_path}: {first[1]}"
            )
        if self._scores.setdefault((benchmark, fingerprint), score) != score:
            raise ValueError(
                f"{path}: got a second result of one encoder for {benchmark}, expected each once: leave one"
                " of the files out"
            )

    def of(self, fingerprint: str | None) -> dict[str, float]:
        """By benchmark."""
        return {name: score for (name, owner), score in self._scores.items() if owner == fingerprint}


def _add_probe(
    scores: _Scores, benchmark: str, path: str, label: str | None, known: Container[str | None]
) -> list[str]:
    """Which of its encoders are not ``known``."""
    probe = ProbeResults.read(Path(path))
    name = chosen_label(probe.labels, label, path)
    for row, encoder in probe.encoders.items():
        scores.add(
            benchmark,
            encoder.fingerprint,
            probe.accuracy[row][name],
            source=(probe.index_hash, probe.protocol),
            path=path,
        )
    return [f"{row} in {path}" for row, encoder in probe.encoders.items() if encoder.fingerprint not in known]


def _with_scores(runs: Sequence[FinishedRun], scores: _Scores) -> list[MeasuredRun]:
    teachers = teachers_among(runs)
    measured: dict[str, MeasuredRun] = {}

    def add(run: FinishedRun) -> MeasuredRun:
        if run.name not in measured:
            measured[run.name] = MeasuredRun(
                run=run,
                size=_size_of(run),
                teachers=[None if teacher is None else add(teacher) for teacher in teachers[run.name]],
                data=_training_data(run.settings.data, run.settings.split),
                flops=training_flops(run, teachers),
                scores=scores.of(run.fingerprint),
            )
        return measured[run.name]

    return [add(run) for run in runs]


def _size_of(run: FinishedRun) -> str:
    """A name of Table 3 where it is one of its sizes."""
    if not (run.path / POINTER).is_file():
        return ""
    encoder = read_config(run.path).encoder
    shapes = {(sizes["encoder"]["width"], sizes["encoder"]["depth"]): name for name, sizes in PRESETS.items()}
    name = shapes.get((encoder.width, encoder.depth))
    return size_name(name) if name is not None else _other_size(encoder)


def size_name(preset: str) -> str:
    """ViT-L for vit-l; the sizes that are ours keep their presets' names."""
    kind, _, letter = preset.partition("-")
    return f"ViT-{letter if letter in 'gG' else letter.upper()}" if kind == "vit" else preset


def _other_size(encoder: EncoderConfig) -> str:
    return f"{encoder.width} x {encoder.depth}"


def _training_data(address: str, split: str) -> TrainingData:
    try:
        info = DatasetInfo.model_validate_json(Folder(address).read("dataset.json"))
    except (OSError, ValueError):  # moved since, or in a store that is not at hand: its name is left
        return TrainingData(name=address.rstrip("/").rpartition("/")[2], num_samples=None)
    num_samples = info.num_samples if split == "all" else info.splits.get(split)
    return TrainingData(name=info.name, num_samples=num_samples)
