"""The site as `make docs` builds it: strict, whole, and without other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", out],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_no_page_fetches_anything_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    fetched = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^\s>]*")
    assert {
        page.name: fetched.findall(page.read_text()) for page in pages if fetched.search(page.read_text())
    } == {}
    assert not any(re.search(r"@import|url\((?:https?:)?//", css.read_text()) for css in site.rglob("*.css"))


def test_commands_values_and_names_are_in_the_reference_and_in_the_search(site):
    train = (site / "reference" / "salt-train.html").read_text()
    assert "--keep-every" in train
    assert "salt-train sweep" in train
    values = (site / "reference" / "configuration.html").read_text()
    assert "lease_s" in values
    assert "seconds" in values
    assert "OptimConfig" in values
    assert "TeacherClient" in (site / "reference" / "python.html").read_text()
    assert "lease_s" in (site / "search" / "search_index.js").read_text()
