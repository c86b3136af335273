"""`salt-eval table`: runs and what was measured of them, a row each or in the paper's tables."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from salt_distill.common.config import TableConfig
from salt_distill.common.console import new_results, say
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.table.measured import measure
from salt_distill.student_trainer.evaluation.table.paper import paper_tables
from salt_distill.student_trainer.evaluation.table.rows import ResultTable, table_of_runs


def run(config: TableConfig) -> None:
    """Prints the tables, and writes them where that is asked for."""
    measured = measure(config)
    tables = paper_tables(measured) if config.layout == "paper" else [table_of_runs(measured)]
    if config.out is not None:
        write_whole(Path(config.out), "\n".join(map(_markdown, tables)))
    for remark in measured.remarks:
        say(remark)
    results = new_results(160)
    if config.json_:
        print(json.dumps([_json(table) for table in tables], indent=2, ensure_ascii=False))
        return
    for table in tables:
        results.print(_drawn(table))


def _drawn(table: ResultTable) -> Table:
    drawn = Table(title=escape(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(table.columns):
        is_text = number < table.num_texts or column == "run"
        drawn.add_column(escape(column), justify="left" if is_text else "right", no_wrap=True)
    for block in table.blocks:
        if not block.rows:
            continue
        if block.heading:
            drawn.add_row(f"[bold]{escape(block.heading)}[/]")
        for row in block.rows:
            drawn.add_row(*map(escape, row))
        drawn.add_section()
    return drawn


def _markdown(table: ResultTable) -> str:
    aligned = [
        "---" if number < table.num_texts or column == "run" else "---:"
        for number, column in enumerate(table.columns)
    ]
    lines = [f"**{table.title}**", "", _line(table.columns), _line(aligned)]
    for block in table.blocks:
        if block.rows and block.heading:
            lines.append(_line([f"**{block.heading}**", *[""] * (len(table.columns) - 1)]))
        lines += map(_line, block.rows)
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _json(table: ResultTable) -> object:
    rows = [
        {"block": block.heading} | dict(zip(table.columns, row, strict=True))
        for block in table.blocks
        for row in block.rows
    ]
    return {"title": table.title, "rows": rows}
