"""A small pool of decoding processes, in which a file that crashes or stalls the decoder costs only
itself. Our own, since the standard library's pool breaks as a whole when one of its processes dies, and
cannot end one that stalls."""

import concurrent.futures
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from salt_distill.common.clip import BadVideoError

START_TIMEOUT_S = 120.0
"""Longest that a worker may take to import what it calls, in seconds."""
EXIT_TIMEOUT_S = 5.0
"""Longest that a worker that closed its socket may take to end, in seconds: what it ends with says why."""


class DecodePool:
    """Calls a function in worker processes. A worker that crashes or does not answer is killed and replaced.

    A thread here holds each worker and waits for it, so a call is one write and one read of a socket, and no
    lock or queue is shared with a process that may die holding it. Workers start with the first items, and
    end with this process, however it ends. Thread safe.
    """

    def __init__(self, num_workers: int, *, timeout_s: float, call: Callable[[Any], Any]) -> None:
        """``call`` is pickled: a function of a module, or an object whose class is one. With 0 workers a
        thread of this process calls it."""
        self._num_workers, self._timeout_s, self._call = num_workers, timeout_s, call
        self._threads = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="decode")
        self._own = threading.local()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, item: Any) -> Future[Any]:
        """What ``call`` returns for an item, or the BadVideoError that it raises, or one that says how the
        decoder ended over it.

        Any other error of ``call`` is a RuntimeError here, with its traceback on stderr.
        """
        return self._threads.submit(self._ask if self._num_workers else self._call, item)

    def close(self) -> None:
        """Ends the workers; items that they have not answered are cancelled."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end(grace_s=0)

    def _ask(self, item: Any) -> Any:
        worker = self._worker()
        try:
            good, value = worker.ask(item, self._timeout_s)
        except TimeoutError:
            self._end(worker, grace_s=0)
            raise BadVideoError(f"the decoder did not answer within {self._timeout_s:g} s") from None
        except (EOFError, ConnectionError):
            code = self._end(worker, grace_s=EXIT_TIMEOUT_S)
            if self._closed:
                raise concurrent.futures.CancelledError from None
            if code > 0:
                raise RuntimeError(
                    f"a decoding process ended with exit code {code}; its traceback is on stderr"
                ) from None
            raise BadVideoError(f"the decoder crashed (signal {-code})") from None
        if good:
            return value
        raise BadVideoError(value)

    def _worker(self) -> "_Worker":
        """The worker of this thread. It is started here, because the kernel ends it with the thread that
        started it."""
        worker = getattr(self._own, "worker", None)
        if worker is None:
            with self._lock:
                if self._closed:
                    raise concurrent.futures.CancelledError
                worker = self._own.worker = _Worker()
                self._workers.add(worker)
            try:
                worker.ask(self._call, START_TIMEOUT_S)
            except (EOFError, OSError) as error:
                code = self._end(worker, grace_s=EXIT_TIMEOUT_S)
                if self._closed:
                    raise concurrent.futures.CancelledError from None
                raise RuntimeError(
                    f"a decoding process cannot start (exit code {code}); its traceback is on stderr"
                ) from error
        return worker

    def _end(self, worker: "_Worker", *, grace_s: float) -> int:
        """The exit code of a worker that is not used again."""
        self._own.worker = None
        with self._lock:
            self._workers.discard(worker)
        return worker.end(grace_s=grace_s)


class _Worker:
    """A process that answers each message with one."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "salt_distill.common.data.pool", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )

    def ask(self, message: Any, timeout_s: float) -> Any:
        """The answer. Raises TimeoutError, or EOFError or ConnectionError where the process ended."""
        self._socket.settimeout(timeout_s)
        _send(self._socket, message)
        return _receive(self._socket)

    def end(self, *, grace_s: float) -> int:
        """The exit code, negative for a signal, of a process that has this long to end by itself."""
        self._socket.close()
        try:
            return self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _send(channel: socket.socket, message: Any) -> None:
    """Arrays go as they lie in memory, after the pickle that refers to them."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    channel.sendall(struct.pack(f"<{1 + len(parts)}q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        channel.sendall(part)


def _receive(channel: socket.socket) -> Any:
    (num_parts,) = struct.unpack("<q", _read(channel, 8))
    sizes = struct.unpack(f"<{num_parts}q", _read(channel, 8 * num_parts))
    body, *buffers = (_read(channel, size) for size in sizes)
    return pickle.loads(body, buffers=buffers)


def _read(channel: socket.socket, num_bytes: int) -> memoryview:
    """Writable memory, as an array that is unpickled from it should be; from numpy, which does not fill it
    with zeros first."""
    data, start = np.empty(num_bytes, np.uint8).data, 0
    while start < num_bytes:
        count = channel.recv_into(data[start:])
        if not count:
            raise EOFError("the other side ended")
        start += count
    return data


def _serve(channel: socket.socket) -> None:
    """The life of a worker: its function first, then items, until this end or the other is closed."""
    try:
        call = _receive(channel)
        _send(channel, None)
        while True:
            item = _receive(channel)
            try:
                answer = True, call(item)
            except BadVideoError as error:
                answer = False, str(error)
            _send(channel, answer)
    except (EOFError, ConnectionError):
        return


def _end_with_parent() -> None:
    """Where the kernel can, have it end this process with the thread that started it: one that hangs in C
    does not see its socket close."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _end_with_parent()
    _serve(socket.socket(fileno=int(sys.argv[1])))
