"""``salt-serve drain`` and ``salt-serve stop``: a service takes nothing new, answers what it has begun, and
may then end."""

import json
import time

from salt_distill.common.config import DrainConfig
from salt_distill.teacher_server.status import call, new_console

_POLL_S = 0.5


def stop(config: DrainConfig) -> None:
    """``drain``, and the service has ended."""
    drain(config, stop=True)


def drain(config: DrainConfig, *, stop: bool = False) -> None:
    """Returns when everything is answered and, with ``stop``, the service is gone. Raises ConnectionError
    where that is not so in time."""
    url = config.url.rstrip("/")
    call(config, "/v1/stop" if stop else "/v1/drain", "POST")
    deadline = time.monotonic() + config.wait
    open_requests = 0
    while True:
        try:
            counters = call(config, "/v1/teacher")["counters"]
        except (ConnectionError, ValueError):  # gone, or what stands before it says that
            if stop:
                break
            raise
        open_requests = counters["open_requests"]
        if not stop and counters["draining"] >= counters["replicas"] and not open_requests:
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
        new_console().print(f"{url} has answered what it had begun, and {done}", soft_wrap=True)
