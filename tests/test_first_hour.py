"""What a newcomer runs first, as it stands: the notebook and the tutorial."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from pages import ROOT, blocks

NOTEBOOK = ROOT / "docs" / "first-hour.ipynb"
BIN = Path(sys.executable).parent


def new_environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def test_the_notebook_has_what_it_gave_and_nothing_of_the_machine_that_ran_it():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 3
    said = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert not re.search(r"/(?:work|tmp|home|root)\b|\x1b|\r", said), said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    inline = "module://matplotlib_inline.backend_inline"  # as in a notebook that a person opens
    client.execute(env={**new_environment(), "TMPDIR": str(tmp_path), "MPLBACKEND": inline})
    [picture, *_] = [
        output
        for cell in notebook.cells[::-1]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(picture.data["image/png"]) > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_runs(tmp_path):
    commands = [block.text for block in blocks("docs/tutorial.md", "bash") if "salt-serve" not in block.text]
    assert len(commands) >= 6
    script = "set -euo pipefail\n" + "".join(commands)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=new_environment(),
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = ["sheet.png", "RUNS/probe.json", "features.parquet", "similar.png", "RUNS/report.html"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
