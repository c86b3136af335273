"""The status page in a real browser: the real service, two replicas, three live runs. Skips where chromium is
absent unless FAIL_WITHOUT_BROWSER=1."""

import json
import os
import re
import threading
import time

import pytest
from screenshots import has_browser, new_browser, prefer
from serve_tools import end, start
from service_tools import Caller, clips_by_digest
from teacher_tools import batch_of, load_teacher, random_clips, serving
from train_tools import metrics_line

from salt_distill.common.config import ServiceClientConfig
from salt_distill.student_trainer.evaluation.report.figures import LossCurve, _loss_range
from salt_distill.student_trainer.targets.service_targets import ServiceTargets
from salt_distill.teacher_server.board.runs import LOST_S

EVIL = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def browser():
    if not has_browser():
        reason = "chromium and chromium-driver are not installed"
        if os.environ.get("FAIL_WITHOUT_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with new_browser() as browser:
        yield browser


class LiveRun:
    """A student's client that asks for clips and reports a loss, a few times a second."""

    def __init__(self, url: str, number: int) -> None:
        self._ended = threading.Event()
        self._shown = {"data": EVIL, "seed": number, "optim": {"lr": 0.001, "betas": [0.9, 0.95]}}
        self._thread = threading.Thread(target=self._live, args=(url, number))
        self._thread.start()

    def _live(self, url: str, number: int) -> None:
        source = ServiceTargets(
            url,
            "float16",
            ServiceClientConfig(retry_budget_s=5),
            f"run-{number}",
            group="g",
            shown=self._shown,
            num_steps=9_999,
        )
        for step in range(1, 10_000):
            if self._ended.wait(0.15):
                break
            source.request(batch_of(random_clips(4, seed=step)), slot=4 * step).result(timeout=30)
            line = {
                "loss": (1 + number) / step,
                "flops": 1e9 * step * (1 + number),
                "teacher_wait_ms": 2.5,
                "step_ms": 60.0,
                "clips_per_s": 25.0,
            }
            if number == 0 and step % 3 == 0:
                line["val_loss"] = 0.25 + 1 / step
            source.report(metrics_line(step=step, slot=4 * step, **line))
        source.close()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def ask(browser, script):
    return browser.execute_script("return " + script)


def table(browser):
    """The runs' rows, each by the table's header."""
    names, *rows = ask(
        browser,
        "[document.querySelector('#columns'), ...document.querySelectorAll('tr.row')].map(row =>"
        " [...row.cells].map(cell => cell.textContent))",
    )
    return [dict(zip(names, row, strict=True)) for row in rows]


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the page never came to that state"
        time.sleep(0.1)


def require_light_and_dark(browser):
    """Light and dark are not the same page."""
    colors = []
    for scheme in ("light", "dark"):
        prefer(browser, scheme)
        colors.append(
            ask(browser, "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])")
        )
    assert len({color for pair in colors for color in pair}) == 4


@pytest.mark.slow
def test_the_page_of_two_replicas_and_three_live_runs(browser, tmp_path):
    load_teacher(tmp_path)
    process, url = start(tmp_path / "teacher-0", "--replicas", "2", "--cpus", "0.4")
    runs = []
    try:
        runs += [LiveRun(url, number) for number in range(3)]
        browser.get(url)
        until(
            lambda: (
                len(
                    ask(
                        browser,
                        "[...document.querySelectorAll('#chart path.run')].filter(path =>"
                        " /L/.test(path.getAttribute('d')))",
                    )
                )
                == 3
            )
        )
        until(lambda: ask(browser, "document.querySelectorAll('#tiles b')[5].textContent") == "2")  # replicas
        rows = table(browser)
        assert [row["run"] for row in rows] == ["run-0", "run-1", "run-2"]
        for row in rows:
            assert (row["clips/s"], row["teacher wait"], row["group"]) == ("25.0", "2.5 ms", "g")
            assert row["ahead"].endswith("clips")
            assert row["step"].endswith(" of 9,999")
            assert (row["status"], row["left"]) == ("running", "10 min")
        assert ask(browser, "document.querySelector('#state').textContent") == "ready"
        assert "another run's work" in ask(browser, "document.querySelector('#avoided-of').textContent")
        # The loss on held-out clips of the run that has one: a dashed line, and a number.
        dashed = "[...document.querySelectorAll('#chart path.val')].map(path => path.dataset.run)"
        until(lambda: ask(browser, dashed) == ["run-0"])
        until(lambda: table(browser)[0]["held-out"].startswith("0."))
        assert [row["held-out"] for row in table(browser)[1:]] == ["\N{EN DASH}"] * 2
        # It is live: steps grow without a reload.
        before = table(browser)[0]["step"]
        until(lambda: table(browser)[0]["step"] != before)
        # The other axis, by the keyboard; and the chart read by the keyboard.
        by_steps = ask(browser, "document.querySelector('#chart path.run').getAttribute('d')")
        browser.execute_script("document.querySelector('#by-flops').click()")
        assert ask(browser, "document.querySelector('#chart path.run').getAttribute('d')") != by_steps
        assert "log" in ask(browser, "document.querySelector('#chart').textContent")
        from selenium.webdriver.common.keys import Keys

        chart = browser.find_element("css selector", "#chart")
        chart.send_keys(Keys.ARROW_LEFT)
        assert "run-2" in ask(browser, "document.querySelector('#tip').textContent")
        assert "run-2: loss" in ask(browser, "document.querySelector('#spoken').textContent")
        # A row opens its configuration, in which nothing is markup.
        browser.find_element("css selector", "tr.row button").click()
        until(
            lambda: (
                "0.001"
                in (ask(browser, "document.querySelector('tr.config:not([hidden])')?.textContent") or "")
            )
        )
        assert EVIL in ask(browser, "document.querySelector('tr.config').textContent")
        assert ask(browser, "document.querySelectorAll('main img').length") == 0
        assert ask(browser, "document.title").endswith("SALT teacher")
        require_light_and_dark(browser)
        # What came before the tab was opened is there at once.
        browser.refresh()
        until(
            lambda: ask(browser, "document.querySelector('#tiles svg path')?.getAttribute('d').includes('L')")
        )
        # Nothing came from elsewhere.
        assert all(
            name.startswith(url)
            for name in ask(browser, "performance.getEntriesByType('resource').map(entry => entry.name)")
        )
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors
    finally:
        for run in runs:
            run.end()
        end(process)
    # The server is gone: the page says since when, and greys what it still shows.
    until(lambda: ask(browser, "document.body.className") == "late")
    assert ask(browser, "document.querySelector('#state').textContent").startswith("no answer since ")
    assert ask(browser, "getComputedStyle(document.querySelector('main')).filter") == "grayscale(1)"
    assert len(table(browser)) == 3


def test_the_page_says_how_runs_ended_and_how_to_join(browser, tmp_path):
    """Finished, stopped and lost are three things; a run alone shares nothing; without a run there is a
    command."""
    with serving(load_teacher(tmp_path)) as (url, inside):
        browser.get(url)
        until(lambda: browser.find_element("css selector", "#command").is_displayed())
        command = browser.find_element("css selector", "#command").text
        assert command.startswith("salt-train student --preset nano ")
        assert f"--teacher-url {url} " in command
        assert not browser.find_element("css selector", "#against").is_displayed()
        caller, clips = Caller(url), clips_by_digest(3)
        for _ in range(2):
            caller.targets(list(clips), clips, run="alone")
        for run, more in {
            "alone": {"activity": "finished"},
            "broken": {"activity": "stopped"},
            "lost": {},
            "trains": {"step_ms": 2000.0},
        }.items():
            assert caller.post(run, step=40, num_steps=100, slot=8, loss=0.5, **more)[0] == 200
        inside.board._board._runs["lost"].seen_s -= 2 * LOST_S
        until(lambda: len(table(browser)) == 4)
        assert [(row["run"], row["status"], row["left"], row["shared"]) for row in table(browser)] == [
            ("trains", "running", "2 min", "\N{EN DASH}"),
            ("alone", "finished", "\N{EN DASH}", "0 %"),
            ("broken", "stopped", "\N{EN DASH}", "\N{EN DASH}"),
            ("lost", "lost", "\N{EN DASH}", "\N{EN DASH}"),
        ]
        assert table(browser)[0]["step"] == "40 of 100"
        shown = (
            "[...document.querySelectorAll('#columns, tr.row')].map(row =>"
            " [...row.cells].filter(cell => cell.checkVisibility()).length)"
        )
        assert ask(browser, shown) == [11] * 5, "a column that no run fills is left out"
        held_out = {"step": 41, "num_steps": 100, "slot": 9, "loss": 0.5, "val_loss": 0.6, "step_ms": 2000.0}
        assert caller.post("trains", **held_out)[0] == 200
        until(lambda: ask(browser, shown) == [12] * 5)
        assert browser.find_element("css selector", "#against").is_displayed()
        marks = (
            "[...document.querySelectorAll('td.status')].map(td => getComputedStyle(td, '::before').content)"
        )
        assert len({mark[1] for mark in ask(browser, marks)}) == 4, "told apart without colours"
        colors = "[...document.querySelectorAll('td.status')].map(td => getComputedStyle(td).color)"
        assert len(set(ask(browser, colors))) == 4
        ends = ask(browser, "[...document.querySelectorAll('#chart .end')].map(mark => mark.outerHTML)")
        ends = {re.sub(r'[\d.]+| (data-run|style)="[^"]*"', "", end) for end in ends}
        assert len(ends) == 4
        endings = browser.find_element("css selector", "#endings").text
        assert "finished: it has done its last step; stopped: it said that it ended" in endings
        until(lambda: not browser.find_element("css selector", "#command").is_displayed())
        assert "0 %" in ask(browser, "document.querySelector('#avoided').textContent")
        assert "a run's own earlier epochs 50 %" in ask(
            browser, "document.querySelector('#keys').textContent"
        )


def test_the_first_steps_do_not_flatten_the_chart(browser, tmp_path):
    """By the rule of the report's: the axis is for the later steps, and what stands above it is said."""
    curves = [
        [7.0, 2.0, *(0.5 - 0.01 * step for step in range(18))],
        [0.6, 0.5],
        [0.9 - 0.01 * step for step in range(9)],
    ]
    with serving(load_teacher(tmp_path)) as (url, _):
        caller = Caller(url)
        for number, losses in enumerate(curves):
            for step, loss in enumerate(losses, 1):
                assert caller.post(f"run-{number}", step=step, slot=step, loss=loss)[0] == 200
        browser.get(url)
        until(lambda: len(table(browser)) == 3)
        until(lambda: browser.find_element("css selector", "#above").text)
        assert browser.find_element("css selector", "#above").text.endswith(
            " can be read: run-0, up to 7.00."
        )
        assert "run-0" in ask(
            browser, "[...document.querySelectorAll('#inside ~ g path.run')][0].dataset.run"
        )
        assert ask(browser, "scale.y(0.5) - scale.y(0.9) > 0.2 * scale.height")
        drawn = [
            LossCurve(name="", colour=0, steps=range(len(losses)), flops=losses, losses=losses)
            for losses in curves
        ]
        for some in (drawn[:1], drawn[1:2], drawn[1:], drawn):
            of_page = ask(browser, f"lossRange({json.dumps([curve.losses for curve in some])})")
            assert of_page == pytest.approx(_loss_range(some))


def locked(app):
    """An app that wants a token, as the service's access does it, but for its page."""

    async def around(scope, receive, send):
        if (
            scope["type"] == "http"
            and scope["path"] != "/"
            and (b"authorization", b"Bearer s3cret") not in scope["headers"]
        ):
            body = json.dumps(
                {"error": "no token", "expected": "a token", "got": "none", "hint": "ask"}
            ).encode()
            await send(
                {"type": "http.response.start", "status": 401, "headers": [(b"www-authenticate", b"Bearer")]}
            )
            return await send({"type": "http.response.body", "body": body})
        return await app(scope, receive, send)

    return around


def test_the_page_asks_for_a_token_before_any_data(browser, tmp_path):
    with serving(load_teacher(tmp_path), around=locked) as (url, _):
        browser.get(url)
        until(lambda: browser.find_element("css selector", "#token").is_displayed())
        assert ask(browser, "document.querySelector('main').hidden")
        assert ask(browser, "document.querySelector('#name').textContent") == ""
        field = browser.find_element("css selector", "#token")
        field.send_keys("wrong\n")
        until(lambda: "does not accept" in ask(browser, "document.querySelector('#refused').textContent"))
        field.send_keys("s3cret\n")
        until(lambda: not ask(browser, "document.querySelector('main').hidden"))
        assert ask(browser, "document.querySelector('#state').textContent") == "ready"
        assert not field.is_displayed()
        browser.refresh()  # the tab keeps it
        until(lambda: ask(browser, "document.querySelector('#state').textContent") == "ready")
