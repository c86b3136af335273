"""``bring_up.py`` as a test."""

import subprocess
import sys
from pathlib import Path

import pytest

CANNOT = 77


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_an_on_premise_cluster_comes_up_loses_a_host_and_goes_down():
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "bring_up.py"], capture_output=True, text=True, check=False
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "left in /tmp: nothing" in done.stdout
