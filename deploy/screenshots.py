"""Pictures of the status page for the README: a teacher with two replicas and three students that share it,
live, in a real browser.

make demo && python deploy/screenshots.py

takes shards and teacher of the demo. Needs chromium and chromium-driver, as Debian packages them.
"""

import argparse
import base64
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars"
)
STUDENTS = {
    "vit-nano": [],
    "vit-nano-deep": ["--set", "encoder.depth=3"],
    "vit-nano-wide": ["--set", "encoder.width=144", "--set", "encoder.mlp_width=576"],
}
"""Runs, and what sets them apart."""


def has_browser() -> bool:
    """Whether chromium and its driver are installed."""
    return shutil.which("chromium") is not None and shutil.which("chromedriver") is not None


@contextmanager
def new_browser(width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """A Chromium without a trace of others', which ends with the block."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="salt-browser-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}"]:
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield browser
        finally:
            browser.quit()


def prefer(browser: Any, scheme: str) -> None:
    """Lets pages believe that their reader prefers ``light`` or ``dark``."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def take(url: str, out: Path) -> None:
    """The pictures of a service with live runs."""
    with new_browser() as browser:
        browser.get(url)
        time.sleep(20)  # the rate has a history then
        for scheme in ("light", "dark"):
            prefer(browser, scheme)
            browser.execute_script(
                "against(arguments[0] === 'dark'); read(arguments[0] === 'dark' ? .6 : null);", scheme
            )
            time.sleep(1)
            height = browser.execute_script("return document.body.offsetHeight")
            clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}
            picture = browser.execute_cdp_cmd(
                "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
            )
            (out / f"page-{scheme}.png").write_bytes(base64.b64decode(picture["data"]))


def main() -> None:
    """Serves, trains, takes the pictures, and ends both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="where `make demo` left shards and teacher"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument(
        "--steps", type=int, default=80, help="that the slowest student has done when the pictures are taken"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="salt-pictures-") as folder:
        ckpt = shutil.copytree(
            options.demo / "teacher", Path(folder) / "v-pixel-nano"
        )  # the page shows the folder's name
        serve = [
            "salt-serve",
            "teacher",
            "--ckpt",
            str(ckpt),
            "--port",
            "0",
            "--replicas",
            "2",
            "--cpus",
            "0.25",
        ]
        server = subprocess.Popen([*serve, "--cache", f"{folder}/cache"], stdout=subprocess.PIPE, text=True)
        students = []
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            common = [
                "--preset",
                "nano",
                "--data",
                str(options.demo / "shards"),
                "--teacher-url",
                url,
                "--views",
                "2",
                "--workers",
                "0",
                "--batch-size",
                "24",
            ]
            for name, settings in STUDENTS.items():
                more = [
                    "--out",
                    f"{folder}/{name}",
                    "--steps",
                    "100000",
                    "--log-every",
                    "2",
                    "--group",
                    "sizes",
                    *settings,
                ]
                students.append(subprocess.Popen(["salt-train", "student", *common, *more]))
            while min((_steps(Path(folder) / name) for name in STUDENTS), default=0) < options.steps:
                assert all(student.poll() is None for student in students), "a student has ended"
                time.sleep(1)
            take(f"{url}/", options.out)
        finally:
            for student in students:
                student.terminate()
                student.wait()
            server.terminate()
            server.wait()


def _steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return 2 * len(path.read_text().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    main()
