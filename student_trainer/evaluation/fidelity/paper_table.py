"""A table of the paper with ours in its cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from salt_distill.student_trainer.evaluation.fidelity.oracle import Oracle

NONE = "\u2014"
"""A cell that the paper leaves empty."""
CROSS = "\u2717"
"""Marks a cell that is another number."""

HOW_TO_READ = (
    "A cell has the printed figure, then ours. Without a mark behind them ours rounds to the printed digits."
    " (cut): leaving out our further digits gives the printed figure. (+0.18 %): ours is so much larger or"
    " smaller; at most 1 %, and for V-JEPA 2 in Table 16 at most 2.5 %. \u2717: the two disagree, and the"
    " reason stands below the table."
)


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table as printed: each cell an oracle, or plain text where the figure is not ours to reproduce."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str | Oracle, ...]]
    notes: tuple[str, ...]

    @property
    def oracles(self) -> list[Oracle]:
        """The cells that are compared."""
        return [cell for row in self.rows for cell in row if isinstance(cell, Oracle)]


def text_of(cell: str | Oracle) -> str:
    """A cell: as printed, ours, and where ours does not round to it, how they compare."""
    if isinstance(cell, str):
        return cell
    verdict = cell.verdict
    remark = "" if verdict.words == "rounded" else f" ({verdict.words})"
    return f"{cell.expected} / {cell.show(cell.find())}{remark}" + ("" if verdict.holds else f" {CROSS}")


def reasons(table: PaperTable) -> list[str]:
    """Why cells are another number."""
    return list(dict.fromkeys(oracle.differs for oracle in table.oracles if oracle.differs is not None))


def remarks(table: PaperTable) -> list[str]:
    """What stands below the table."""
    return [f"{CROSS} {reason}" for reason in reasons(table)] + list(table.notes)
