"""`salt-eval fidelity`: computes every oracle and writes docs/fidelity.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from salt_distill.common.config import FidelityConfig, FlopsConfig, preset_layer
from salt_distill.common.console import console
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.fidelity import crops, masks, models, probes, text, training
from salt_distill.student_trainer.evaluation.fidelity.oracle import Oracle
from salt_distill.student_trainer.evaluation.fidelity.paper_flops import tables
from salt_distill.student_trainer.evaluation.fidelity.paper_table import (
    HOW_TO_READ,
    PaperTable,
    reasons,
    remarks,
    text_of,
)
from salt_distill.student_trainer.evaluation.flops_table import runs_of

PAPER_RUNS = {
    "V-Pixel L, 80k steps": ("vit-l", {"steps": 80_000}),
    "SALT-L, 80k + 160k": ("vit-l", {"teacher": "vit-l", "teacher_steps": [80_000]}),
    "SALT-H, 80k + 160k": ("vit-h", {"teacher": "vit-l", "teacher_steps": [80_000]}),
    "SALT-g, 80k + 160k": ("vit-g", {"teacher": "vit-l", "teacher_steps": [80_000]}),
    "SALT-G, 80k + 160k": ("vit-G", {"teacher": "vit-l", "teacher_steps": [80_000]}),
    "V-JEPA 2 L, 240k, 256 x 256": (
        "vit-l",
        {"teacher": "ema", "steps": 240_000, "view": {"crop_size": 256}},
    ),
    "V-JEPA 2 H, 240k, 256 x 256": (
        "vit-h",
        {"teacher": "ema", "steps": 240_000, "view": {"crop_size": 256}},
    ),
    "V-JEPA 2 g, 240k, 256 x 256": (
        "vit-g",
        {"teacher": "ema", "steps": 240_000, "view": {"crop_size": 256}},
    ),
}
"""Preset and flags of `salt-eval flops`."""


@dataclass(frozen=True, kw_only=True)
class OracleSection:
    """A table of oracles."""

    title: str
    oracles: Callable[[], list[Oracle]]
    lead: str = ""


SECTIONS = (
    OracleSection(title="Encoders", oracles=models.encoders, lead=text.MODELS),
    OracleSection(title="Predictors", oracles=models.predictors),
    OracleSection(title="Rotary positions", oracles=models.rope, lead=text.ROPE),
    OracleSection(title="At initialisation", oracles=models.initial, lead=text.INITIAL),
    OracleSection(title="Random resized crop", oracles=crops.crops, lead=text.CROPS),
    OracleSection(title="Mask blocks", oracles=masks.blocks, lead=text.MASKS),
    OracleSection(title="Shares of the tokens, by clips that share a block", oracles=masks.fractions),
    OracleSection(title="Tokens of each time step, 24 clips", oracles=masks.slices, lead=text.TRUNCATION),
    OracleSection(
        title="Schedules and pixel targets",
        oracles=lambda: training.schedules() + training.pixels(),
        lead=text.TRAINING,
    ),
    OracleSection(title="Probes", oracles=probes.probes, lead=text.PROBES),
    OracleSection(title="Compute", oracles=training.compute, lead=text.COMPUTE),
)


def run(config: FidelityConfig) -> None:
    """Writes the page, and says what it found. Raises ValueError where an oracle does not give what the page
    promises."""
    out = Path(config.out)
    if not out.parent.is_dir():
        raise ValueError(f"got --out {out}, but there is no folder {out.parent} here: give --out FILE.md")
    torch.set_num_threads(1)
    write_whole(out, page())
    wrong = [oracle for oracle in oracles() if oracle.verdict.holds != (oracle.differs is None)]
    if wrong:
        names = "; ".join(
            f"{oracle.name}: {oracle.show(oracle.find())}, expected {oracle.show(oracle.expected)}"
            for oracle in wrong
        )
        raise ValueError(f"{config.out}: {len(wrong)} oracles are not as expected: {names}")
    console.print(
        f"{config.out}: {_summary()}", *_what_differs(), sep="\n- ", highlight=False, soft_wrap=True
    )


def oracles() -> list[Oracle]:
    """All of them."""
    return [oracle for section in SECTIONS for oracle in section.oracles()] + [
        oracle for table in tables() for oracle in table.oracles
    ]


def page() -> str:
    """docs/fidelity.md."""
    parts = [
        "# Fidelity\n",
        text.LEAD.strip() + "\n",
        f"**{_summary()}**\n",
        "".join(f"- {line}\n" for line in _what_differs()),
    ]
    for section in SECTIONS:
        parts += [
            f"## {section.title}\n",
            *([section.lead.strip() + "\n"] if section.lead else []),
            _oracle_table(section.oracles()),
        ]
    parts += [_both_counts(), "## The paper's tables of compute\n", HOW_TO_READ + "\n"]
    parts += [_paper_table(table) for table in tables()]
    parts += ["## Choices\n", text.CHOICES.strip() + "\n"]
    return "\n".join(parts)


def _summary() -> str:
    every = oracles()
    differ = sum(oracle.differs is not None for oracle in every)
    near_by = sum(oracle.verdict.holds and oracle.verdict.words.startswith(("+", "-")) for oracle in every)
    return (
        f"Of {len(every)} numbers {len(every) - differ} agree. {near_by} of these are printed with other last"
        " digits; the notes below their tables say why. The other"
        f" {differ} are figures of the paper that disagree with ours, for these reasons:"
    )


def _what_differs() -> list[str]:
    return [f"{table.title.split(':')[0]}: {reason}" for table in tables() for reason in reasons(table)]


def _oracle_table(oracles: Sequence[Oracle]) -> str:
    rows = [
        (
            oracle.name,
            oracle.source,
            oracle.show(oracle.expected),
            oracle.show(oracle.find()),
            oracle.verdict.words,
        )
        for oracle in oracles
    ]
    return _table(("oracle", "source", "expected", "found", "verdict"), rows)


def _paper_table(table: PaperTable) -> str:
    rows = [tuple(map(text_of, row)) for row in table.rows]
    notes = "\n".join(f"- {remark}" for remark in remarks(table))
    return f"### {table.title}\n\n{_table(table.columns, rows)}\n{notes}\n"


def _both_counts() -> str:
    rows = []
    for name, (preset, flags) in PAPER_RUNS.items():
        config = FlopsConfig.model_validate(preset_layer(FlopsConfig, preset) | flags)
        chain = runs_of(config)
        by_rule, exact = sum(run.six_n_d.total for run in chain), sum(run.exact.total for run in chain)
        attention = sum(run.exact.attention for run in chain)
        rows.append(
            (
                name,
                f"{by_rule / 1e21:.3f}",
                f"{exact / 1e21:.3f}",
                f"{exact / by_rule:.2f}",
                f"{attention / exact:.0%}",
            )
        )
    return _table(("run", "6ND (10^21)", "exact (10^21)", "ratio", "attention's share"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
