"""``salt-serve status``, ``runs``, ``drain`` and ``stop``: what a running service says of itself, and what it
is told."""

import contextlib
import http.client
import json
import time
import urllib.parse
from datetime import timedelta
from typing import Any

from rich import box
from rich.filesize import decimal
from rich.measure import Measurement
from rich.table import Table

from salt_distill.common.config import DrainConfig, OfServiceConfig, RunsConfig, StatusConfig
from salt_distill.common.console import new_results
from salt_distill.common.credentials import access_token, authorization, trusted
from salt_distill.common.deadline import Deadline, new_connection
from salt_distill.common.foreign_answer import in_words, is_web_page
from salt_distill.common.protocol import BoardRun, Route, RunState, TeacherFacts

_POLL_S = 0.2
_ANSWER_S = 10.0
"""How long a whole answer may take."""
_MAX_BYTES = 64_000_000
"""Of an answer: far more than a board of many runs."""
_SAID_BYTES = 10_000
"""Of an error's answer that are looked at."""

_FAULTS = (
    "refused",
    "busy",
    "expired",
    "abandoned",
    "retries_seen",
    "forwards_hung",
    "replicas_lost",
    "disk_not_written",
    "disk_not_read",
    "disk_corrupt",
    "board_not_written",
    "board_corrupt",
)
"""Counters of what went wrong; those that are not 0 are shown."""
_WIDEST = 1000
"""Characters of a line: a run's name and its loss stand on one, however narrow the terminal is."""
_COLUMNS = (
    *("run", "status", "step", "left", "loss", "held-out", "predicted", "clips/s", "wait ms"),
    *("clips served", "shared", "group", "ahead", "heard"),
)
"""Of the table of runs. ``predicted``: accuracy by ``--predict-from``, and where 95% of new runs lie."""
_OF_SOME_RUNS = ("held-out", "predicted", "group", "ahead")
"""Columns that are left out where no run fills them."""


def show_status(config: StatusConfig) -> None:
    """Prints teacher, counters and runs on standard output. Raises ConnectionError where the service is not
    ready in time."""
    facts, runs = _ready_facts(config), _runs(config)
    if config.json_:
        known = {**facts.model_dump(mode="json"), "runs": [run.model_dump(mode="json") for run in runs]}
        print(json.dumps(known, indent=2))
        return
    _print(_teacher_table(facts), _counters_table(facts), _runs_table(runs))


def show_runs(config: RunsConfig) -> None:
    """Prints the runs on standard output. Raises ConnectionError where the service does not answer."""
    runs = _runs(config)
    if config.json_:
        print(json.dumps([run.model_dump(mode="json") for run in runs], indent=2))
    else:
        _print(_runs_table(runs))


def _print(*tables: Table) -> None:
    console = new_results()
    for table in tables:
        needed = Measurement.get(console, console.options.update_width(_WIDEST), table).maximum
        console.width = max(console.width, needed)
        console.print(table)


def stop(config: DrainConfig) -> None:
    """``drain``, and the service has ended."""
    drain(config, stop=True)


def drain(config: DrainConfig, *, stop: bool = False) -> None:
    """Returns when everything is answered and, with ``stop``, the service is gone. Raises ConnectionError
    where that is not so in time."""
    url = config.url.rstrip("/")
    call(config, Route.STOP if stop else Route.DRAIN, "POST")
    deadline = time.monotonic() + config.wait
    open_requests = 0
    while True:
        try:
            counters = _facts(config).counters
        except (ConnectionError, ValueError) as error:
            if not stop:
                raise
            if _is_gone(error):
                break
        else:
            open_requests = counters.open_requests
            if not stop and counters.draining >= counters.replicas and not open_requests:
                break
        if time.monotonic() > deadline:
            what = "has not ended" if stop else "has not answered everything"
            raise ConnectionError(
                f"{url} {what} after {config.wait:g} s, {open_requests} requests are open: look at its log,"
                " or raise --wait"
            )
        time.sleep(_POLL_S)
    if config.json_:
        print(json.dumps({"url": url, "ending": "stop" if stop else "drain", "open_requests": 0}))
    else:
        done = "has ended" if stop else "takes no new requests; end it with `salt-serve stop`"
        new_results().print(f"{url} has answered what it had begun, and {done}", soft_wrap=True)


def call(service: OfServiceConfig, path: str, method: str = "GET") -> Any:
    """What a service answers. Raises ConnectionError where it is not there or not in time, RefusedError where
    it refuses."""
    url = service.url.rstrip("/")
    try:
        response, content = _answer(service, path, method)
        if response.status < 300:
            if is_web_page(content):
                raise ValueError(f"it answers with {in_words(content)}, expected a teacher service")
            return json.loads(content)
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{url} does not answer {method} {path}: {error}: give the URL that `salt-serve teacher` has"
            " printed"
        ) from error
    if response.status < 400:
        raise RefusedError(
            response.status,
            f"{url} sends {method} {path} elsewhere, to {response.getheader('Location')}, where its token"
            " does not go: give the URL of the service itself",
        )
    shown = in_words(content[:_SAID_BYTES])
    raise RefusedError(response.status, f"{url} refused {method} {path}: {response.status} {shown}")


class RefusedError(ValueError):
    """A service has answered, and not with what it was asked for."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def _answer(service: OfServiceConfig, path: str, method: str) -> tuple[http.client.HTTPResponse, bytes]:
    """A token goes to the service that it was given for, and nowhere else: no redirect is followed."""
    parts = urllib.parse.urlsplit(service.url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
    tls = trusted(service.ca) if parts.scheme == "https" else None
    connection = new_connection(parts, tls, _ANSWER_S)
    Deadline.after(_ANSWER_S, f"{_ANSWER_S:g} s").bounds(connection)
    with contextlib.closing(connection):
        # the type of an empty body: a web page cannot send this one to a service that it does not belong to
        headers = {"Content-Type": "application/json", **authorization(access_token(service.token_file))}
        connection.request(method, parts.path.rstrip("/") + path, headers=headers)
        response = connection.getresponse()
        return response, response.read(_MAX_BYTES)


def _is_gone(error: Exception) -> bool:
    """Whether nobody listens any more, or what stands before a service knows none. A service that is slow or
    refuses is still there."""
    if isinstance(error, RefusedError):
        return error.status in (404, 503)
    return isinstance(error.__cause__, ConnectionRefusedError)


def _facts(service: OfServiceConfig) -> TeacherFacts:
    return TeacherFacts.model_validate(call(service, Route.TEACHER))


def _runs(service: OfServiceConfig) -> list[BoardRun]:
    return [BoardRun.model_validate(run) for run in call(service, Route.RUNS)]


def _ready_facts(config: StatusConfig) -> TeacherFacts:
    """``GET /v1/teacher`` of a service that is ready, or that ends."""
    deadline = time.monotonic() + config.wait
    while True:
        try:
            facts = _facts(config)
            if facts.ready:
                return facts
            reason = "it has not done its first forward"
        except (ConnectionError, ValueError) as error:  # refused, or another's error while it starts
            reason = str(error)
        if time.monotonic() >= deadline:
            raise ConnectionError(
                f"{config.url} is not ready after {config.wait:g} s: {reason}. Start `salt-serve teacher`, or"
                " raise --wait"
            )
        time.sleep(_POLL_S)


def _teacher_table(facts: TeacherFacts) -> Table:
    state = {"no": "ready", "drain": "drained: takes no new requests", "stop": "ends"}[facts.ending]
    clips, grid = ("x".join(map(str, shape)) for shape in (facts.clip_shape, facts.grid))
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("teacher", f"{facts.name}, {state}")
    table.add_row("fingerprint", facts.fingerprint)
    table.add_row("clips", f"{clips}, to {grid} tokens of width {facts.width}")
    table.add_row("compute", ", ".join(f"{name} {value}" for name, value in facts.compute.items()))
    table.add_row("ingress", f"{facts.ingress}, {facts.buckets} buckets, {facts.counters.replicas} replicas")
    return table


def _counters_table(facts: TeacherFacts) -> Table:
    """What a person wants to know first; ``--json`` has every counter."""
    counters = facts.counters
    ms = f", {1000 * counters.forward_s / counters.forwards:,.1f} ms each" if counters.forwards else ""
    faults = [f"{name} {value:,}" for name in _FAULTS if (value := getattr(counters, name))]
    shared = f" ({counters.shared / counters.clips_served:.0%})" if counters.clips_served else ""
    rows = {
        "targets sent": f"{counters.clips_served:,}: {counters.clips_computed:,} computed,"
        f" {counters.coalesced:,} already begun by another request, {counters.from_memory:,} from memory,"
        f" {counters.from_disk:,} from disk",
        "shared": f"{counters.shared:,} targets that another run had asked for{shared}",
        "forwards": f"{counters.forwards:,}{ms}, {counters.batch_fill:.0%} of a batch filled",
        "traffic": f"{decimal(counters.bytes_in)} of clips in, {decimal(counters.bytes_out)} of targets out",
        "now": f"{counters.open_requests:,} requests open, {counters.queued_clips:,} clips wait,"
        f" {counters.memory_clips:,} targets in memory ({decimal(counters.memory_bytes)}),"
        f" {counters.disk_clips:,} on disk",
        "faults": ", ".join(faults) or "none",
    }
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _runs_table(runs: list[BoardRun]) -> Table:
    rows = [_reported(run.progress) | _of_board(run) for run in runs]
    names = [name for name in _COLUMNS if name not in _OF_SOME_RUNS or any(row[name] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(
            name, justify="left" if name in ("run", "status", "group") else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _reported(state: RunState | None) -> dict[str, str]:
    """The cells that a run has said itself."""
    if state is None:
        return dict.fromkeys(("step", "loss", "held-out", "predicted", "clips/s", "wait ms", "group"), "")
    interval = f"{_cell(state.predicted_low, '.3f')} to {_cell(state.predicted_high, '.3f')}"
    return {
        "step": f"{state.step:,}" + ("" if state.num_steps is None else f" of {state.num_steps:,}"),
        "loss": _cell(state.loss, ".4f"),
        "held-out": _cell(state.val_loss, ".4f"),
        "predicted": ""
        if state.predicted_accuracy is None
        else f"{state.predicted_accuracy:.3f} ({interval})",
        "clips/s": _cell(state.clips_per_s, ",.1f"),
        "wait ms": _cell(state.teacher_wait_ms, ",.1f"),
        "group": state.group or "",
    }


def _of_board(run: BoardRun) -> dict[str, str]:
    """The cells that the board knows."""
    return {
        "run": run.id,
        "status": run.status,
        "left": "" if run.left_s is None else str(timedelta(seconds=round(run.left_s))),
        "clips served": f"{run.clips_served:,}",
        "shared": _cell(run.hit_rate, ".0%"),
        "ahead": _cell(run.skew_clips, ","),
        "heard": f"{max(0.0, time.time() - run.seen_s):,.0f} s ago",
    }


def _cell(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
