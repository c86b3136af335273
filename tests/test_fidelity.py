"""Every number that the paper and the reference code give about the method; docs/fidelity.md is what the
command writes."""

from pathlib import Path

import pytest

from salt_distill.common.config import FidelityConfig
from salt_distill.student_trainer.evaluation.fidelity import page
from salt_distill.student_trainer.evaluation.fidelity.oracle import Oracle, exact, near, printed
from salt_distill.student_trainer.evaluation.fidelity.paper_flops import TABLES

COMMITTED = Path(__file__).parent.parent / "docs" / "fidelity.md"
SUBJECTS = {section.title: section.oracles for section in page.SECTIONS} | {
    table.__name__: lambda table=table: table().oracles for table in TABLES
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_numbers_are_the_sources_but_where_the_page_says_why_not(subject):
    oracles: list[Oracle] = SUBJECTS[subject]()
    assert oracles
    wrong = [
        f"{oracle.name} ({oracle.source}): {oracle.show(oracle.find())}, expected"
        f" {oracle.show(oracle.expected)}: {oracle.verdict.words}"
        for oracle in oracles
        if oracle.verdict.holds != (oracle.differs is None)
    ]
    assert wrong == []


def test_the_committed_page_is_what_the_command_writes(tmp_path):
    page.run(FidelityConfig(out=str(tmp_path / "fidelity.md")))
    assert (tmp_path / "fidelity.md").read_text() == COMMITTED.read_text()


def test_a_wrong_number_ends_the_command(tmp_path, monkeypatch):
    wrong = exact("tokens", "by hand", 7, lambda: 8)
    monkeypatch.setattr(page, "SECTIONS", (page.OracleSection(title="Wrong", oracles=lambda: [wrong]),))
    monkeypatch.setattr(page, "PAPER_RUNS", {})
    with pytest.raises(ValueError, match="1 oracles are not as expected: tokens: 8, expected 7"):
        page.run(FidelityConfig(out=str(tmp_path / "fidelity.md")))
    assert "| tokens | by hand | 7 | 8 | differs |" in (tmp_path / "fidelity.md").read_text()


@pytest.mark.parametrize(
    ("figure", "ours", "within", "words", "holds"),
    [
        ("1.5", 1.497, 0.01, "rounded", True),
        ("1.5", 1.4501, 0.01, "rounded", True),
        ("1.8", 1.853, 0.01, "cut", True),
        ("0.241", 0.2426, 0.01, "+0.66 %", True),
        ("0.241", 0.2436, 0.01, "+1.08 %", False),
        ("1.9", 1.853, 0.0, "rounded", True),
        ("1.9", 1.849, 0.01, "-2.68 %", False),
        ("165.9", 1659.0, 0.01, "10 times", False),
    ],
)
def test_printed_figures_are_rounded_cut_or_near(figure, ours, within, words, holds):
    verdict = printed("figure", "table", figure, lambda: ours, within=within).verdict
    assert (verdict.words, verdict.holds) == (words, holds)


def test_every_member_of_a_vector_is_compared():
    assert near("vector", "hand", (1.0, 2.0), lambda: [1.005, 1.995], within=0.01).verdict.holds
    assert not near("vector", "hand", (1.0, 2.0), lambda: [1.0, 2.02], within=0.01).verdict.holds
    assert near("share", "hand", 200.0, lambda: 201.0, within=0.01, relative=True).verdict.holds
    assert not near("number", "hand", 200.0, lambda: 201.0, within=0.01).verdict.holds
