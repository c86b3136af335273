"""What a model's surprise at pairs of videos says, as `physics.json` has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from rich.table import Table

from salt_distill.student_trainer.evaluation.physics.benchmarks import VideoPair
from salt_distill.student_trainer.evaluation.probe.score import Score
from salt_distill.student_trainer.evaluation.records import EncoderIdentity, Record

FILTERED = "filtered"
"""The least surprise of all context lengths at each window: no length has to be chosen."""
HOWS = ("average", "maximum")
"""Over the windows of a video (Eq. 3)."""


@dataclass(frozen=True, kw_only=True)
class PairSurprise:
    """The surprise at both videos of a pair, ``[contexts, windows]``."""

    pair: VideoPair
    possible: np.ndarray
    impossible: np.ndarray

    def right(self, row: int | None, how: str) -> bool:
        """Whether the impossible video surprises more, strictly; ``row``: a context length, or None for
        FILTERED."""
        sides = [side.min(0) if row is None else side[row] for side in (self.possible, self.impossible)]
        possible, impossible = (side.mean() if how == "average" else side.max() for side in sides)
        return bool(possible < impossible)


Accuracies = Mapping[str, Mapping[str, Mapping[str, Score]]]
"""How -> context length or FILTERED -> property -> pairs judged right."""


class PropertyScore(Record):
    """The relative accuracy of a property."""

    accuracy: float
    interval: tuple[float, float]
    """95% Wilson interval."""
    num_pairs: int


class VideoSurprise(Record):
    """Over the windows of a video, for each context length."""

    average: list[float]
    maximum: list[float]


class SurpriseOfPair(Record):
    """Both videos of a pair."""

    possible: VideoSurprise
    impossible: VideoSurprise


class PhysicsResults(Record):
    """``physics.json``. Tables are by how windows are summed up, then by context length or FILTERED."""

    writer: ClassVar[str] = "salt-eval physics"

    benchmark: Literal["intphys", "grasp", "inflevel"]
    encoder: EncoderIdentity
    """That predicts; the view is that of a window."""
    teacher_fingerprint: str | None
    """Of the encoder whose latents are predicted; none where pixels are."""
    run_fingerprint: str
    """By which the run is known that this is of: the encoder's; of a baseline its moving average's."""
    index_hash: str
    """Of the pairs: their names, and the names and sizes of their files."""
    protocol: str
    contexts: list[int]
    """Frames."""
    fixed_context: dict[str, dict[str, float]]
    """The mean over properties."""
    best_context: dict[str, float]
    best_context_note: str = (
        "for each property the best row, chosen on the pairs that it is reported on: the published headline"
    )
    accuracy: dict[str, dict[str, dict[str, PropertyScore]]]
    """By property at last."""
    surprise: dict[str, SurpriseOfPair]
    """By the name of a pair."""
    skipped: dict[str, str]
    """Pairs that could not be read, and why."""

    @classmethod
    def of(
        cls,
        pairs: Sequence[PairSurprise],
        contexts: Sequence[int],
        *,
        benchmark: Literal["intphys", "grasp", "inflevel"],
        encoder: EncoderIdentity,
        teacher_fingerprint: str | None,
        run_fingerprint: str,
        index_hash: str,
        protocol: str,
        skipped: Mapping[str, str],
    ) -> "PhysicsResults":
        """From the surprise at each pair."""
        scores = accuracies(pairs, contexts)
        return cls(
            benchmark=benchmark,
            encoder=encoder,
            teacher_fingerprint=teacher_fingerprint,
            run_fingerprint=run_fingerprint,
            index_hash=index_hash,
            protocol=protocol,
            contexts=list(contexts),
            fixed_context={
                how: {name: macro(row) for name, row in rows.items()} for how, rows in scores.items()
            },
            best_context={how: best_context(rows) for how, rows in scores.items()},
            accuracy={
                how: {name: _property_scores(row) for name, row in rows.items()}
                for how, rows in scores.items()
            },
            surprise={surprise.pair.name: _surprise_of_pair(surprise) for surprise in pairs},
            skipped=dict(skipped),
        )


def _property_scores(row: Mapping[str, Score]) -> dict[str, PropertyScore]:
    return {
        name: PropertyScore(accuracy=score.accuracy, interval=score.interval, num_pairs=score.num_clips)
        for name, score in row.items()
    }


def _surprise_of_pair(surprise: PairSurprise) -> SurpriseOfPair:
    sides = (
        VideoSurprise(average=values.mean(1).tolist(), maximum=values.max(1).tolist())
        for values in (surprise.possible, surprise.impossible)
    )
    return SurpriseOfPair(possible=next(sides), impossible=next(sides))


def accuracies(pairs: Sequence[PairSurprise], contexts: Sequence[int]) -> Accuracies:
    """The relative accuracy: the share of pairs whose impossible video surprises more."""
    properties = sorted({surprise.pair.property for surprise in pairs})
    rows: dict[str, int | None] = {str(context): row for row, context in enumerate(contexts)} | {
        FILTERED: None
    }
    return {
        how: {
            name: {
                key: Score(
                    num_correct=sum(
                        surprise.right(row, how) for surprise in pairs if surprise.pair.property == key
                    ),
                    num_clips=sum(surprise.pair.property == key for surprise in pairs),
                )
                for key in properties
            }
            for name, row in rows.items()
        }
        for how in HOWS
    }


def macro(scores: Mapping[str, Score]) -> float:
    """The mean over properties."""
    return float(np.mean([score.accuracy for score in scores.values()]))


def best_context(scores: Mapping[str, Mapping[str, Score]]) -> float:
    """The published headline: for each property the best of all rows, chosen on the very pairs it is reported
    on; then the mean."""
    properties = next(iter(scores.values()))
    return float(np.mean([max(row[key].accuracy for row in scores.values()) for key in properties]))


def table(scores: Accuracies, protocol: str) -> Table:
    """A row for each property, a column for each context length: average surprise; then the means, and those
    of the maximum."""
    rows = scores["average"]
    shown = Table(
        title="Relative accuracy, average surprise (chance 0.5)",
        caption=f"{protocol}; best: of all contexts, chosen on these pairs",
    )
    shown.add_column("property")
    for name in (*rows, "best"):
        shown.add_column(name, justify="right")
    for key, filtered in rows[FILTERED].items():
        interval = "  [dim]{:.2f}-{:.2f}[/]".format(*filtered.interval)
        cells = [
            f"{row[key].accuracy:.3f}{interval if name == FILTERED else ''}" for name, row in rows.items()
        ]
        shown.add_row(key, *cells, f"{max(row[key].accuracy for row in rows.values()):.3f}")
    shown.add_section()
    for how, row_scores in scores.items():
        title = "mean" if how == "average" else "mean, maximum surprise"
        shown.add_row(
            title,
            *(f"[bold]{macro(row):.3f}[/]" for row in row_scores.values()),
            f"{best_context(row_scores):.3f}",
        )
    return shown
