"""What the tests of the teacher service share: a teacher at a gate, and a client that does what a test says,
and no more."""

import http.client
import json
import threading
import time
import urllib.parse

from teacher_tools import batch_of, random_clips

from salt_distill.common.protocol import ARROW_TYPE
from salt_distill.common.targets import wire

ARROW = {"Content-Type": ARROW_TYPE}


class GatedTeacher:
    """A teacher whose forwards wait at a gate, so that a test decides what happens meanwhile."""

    def __init__(self, teacher):
        self.spec, self._teacher = teacher.spec, teacher
        self.gate, self.batches = threading.Event(), []
        self.gate.set()

    def forward(self, clips):
        assert self.gate.wait(20)
        self.batches.append(len(clips))
        return self._teacher.forward(clips)


class FailingTeacher(GatedTeacher):
    """One whose second forward fails."""

    def forward(self, clips):
        if len(self.batches) == 1:
            self.batches.append(0)
            raise RuntimeError("out of memory")
        return super().forward(clips)


class Caller:
    """A client that does what a test says, and no more."""

    def __init__(self, url):
        self.parts = urllib.parse.urlsplit(url)

    def send(self, method, path, body=None, headers=None, timeout=20):
        connection = http.client.HTTPConnection(self.parts.hostname, self.parts.port, timeout=timeout)
        try:
            connection.request(method, self.parts.path + path, body=body, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def json(self, path):
        status, _, body = self.send("GET", path)
        assert status == 200, body
        return json.loads(body)

    def counters(self):
        return self.json("/v1/teacher")["counters"]

    def ask(self, digests, clips=None, dtype="float16", timeout=20, token_idx=None, run="test", headers=None):
        """Status and body. ``clips`` maps digests to pixels; the others are asked for without bytes."""
        rows = [
            wire.RequestRow(
                clip_digest=digest, clip=None if clip is None else clip.tobytes(), token_idx=token_idx
            )
            for digest, clip in ((digest, (clips or {}).get(digest)) for digest in digests)
        ]
        sent = {**ARROW, "X-Salt-Run": run, **(headers or {})}
        status, _, body = self.send(
            "POST", "/v1/targets", b"".join(wire.write_request(dtype, rows)), sent, timeout
        )
        return status, body

    def targets(self, *args, **kwargs):
        """Header, and rows in order."""
        status, body = self.ask(*args, **kwargs)
        assert status == 200, body
        return wire.read_response(body)

    def statuses(self, *args, **kwargs):
        return [row.status for row in self.targets(*args, **kwargs)[1]]

    def post(self, run, **progress):
        """Status and body of a progress report."""
        status, _, body = self.send(
            "POST", f"/v1/runs/{run}/progress", json.dumps(progress), {"Content-Type": "application/json"}
        )
        return status, json.loads(body)


def clips_by_digest(count, seed=0):
    batch = batch_of(random_clips(count, seed))
    return dict(zip(batch.digests, batch.pixels, strict=True))


def wait_until(condition, seconds=30):
    """Waits for a state of the service that the test needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the state that the test waits for never came"
        time.sleep(0.005)
