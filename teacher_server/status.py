"""``salt-serve status``: what a running service says of itself."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

from common.config import StatusConfig

_POLL_S = 0.2


def show_status(config: StatusConfig) -> None:
    """Prints teacher, counters and runs on standard output. Raises ConnectionError where the service is not ready in time."""
    url = config.url.rstrip("/")
    _wait_until_ready(url, config.wait)
    facts = {**_get(f"{url}/v1/teacher"), "runs": _get(f"{url}/v1/runs")}
    print(json.dumps(facts, indent=2) if config.format == "json" else _text(facts))


def _wait_until_ready(url: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            _get(f"{url}/readyz")
            return
        except OSError as error:  # refused, or 503 before the first forward
            if time.monotonic() >= deadline:
                raise ConnectionError(
                    f"{url} is not ready after {wait_s:g} s: {error}. Start `salt-serve teacher`, or raise --wait"
                ) from error
        time.sleep(_POLL_S)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)


def _text(facts: dict[str, Any]) -> str:
    counters = facts["counters"]
    clips = "x".join(str(side) for side in facts["clip_shape"])
    grid = "x".join(str(side) for side in facts["grid"])
    lines = [
        f"teacher {facts['name']}  {facts['fingerprint'][:16]}  clips {clips}  tokens {grid} of width {facts['width']}",
        f"ingress {facts['ingress']}  buckets {facts['buckets']}",
        "compute " + "  ".join(f"{name} {value}" for name, value in facts["compute"].items()),
        *(f"{name:>16} {round(value, 3)}" for name, value in counters.items()),
    ]
    for run in facts["runs"]:
        progress = run["progress"]
        where = "no progress posted" if progress is None else f"step {progress['step']}  loss {progress['loss']}"
        shared = "" if run["hit_rate"] is None else f", {run['hit_rate']:.0%} of them shared"
        ahead = "" if run["skew_clips"] is None else f", {run['skew_clips']} clips ahead of its group"
        lines.append(f"run {run['id']}: {run['clips_served']} clips served{shared}, {where}{ahead}")
    return "\n".join(lines)
