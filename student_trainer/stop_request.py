"""How a command asks its Ray Train workers to stop: through the table of Ray's head, which every process of a
cluster reaches. A signal comes to the command alone."""

import threading
import time

_LISTENING, _ASKED, _HEARD = b"listening", b"asked", b"heard"
_POLL_S = 0.5
_HEARD_S = 8.0
"""How long a worker that listens may take to hear a request."""


class StopRequests:
    """What the first worker hears: whether its command asks the workers to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._thread: threading.Thread | None = None

    def is_asked(self) -> bool:
        """Answers at once. From the first call on it listens, beside the work."""
        if self._thread is None:
            _put(_LISTENING)
            self._thread = threading.Thread(target=self._listen, name="stop-request", daemon=True)
            self._thread.start()
        return self._asked.is_set()

    def _listen(self) -> None:
        while _get() != _ASKED:
            time.sleep(_POLL_S)
        _put(_HEARD)
        self._asked.set()


def ask_to_stop() -> bool:
    """Asks the workers of this command; whether the first one has heard it. False at once where none
    listens."""
    if _get() != _LISTENING:
        return False
    _put(_ASKED)
    until = time.monotonic() + _HEARD_S
    while _get() != _HEARD:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _get() -> bytes | None:
    from ray.experimental import internal_kv

    return internal_kv._internal_kv_get(_key(), namespace="salt")


def _put(state: bytes) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_key(), state, namespace="salt")


def _key() -> str:
    """Of this command and its workers, which are one job of Ray."""
    import ray

    return f"stop-{ray.get_runtime_context().get_job_id()}"
