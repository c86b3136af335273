"""Targets of a teacher service: what the service lacks is uploaded, what it has is only asked for."""

import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.clip import ClipBatch
from common.config import ServiceClientConfig, TargetDtype
from common.model.teacher import TeacherSpec
from common.targets import codec, wire
from student_trainer.teacher_client import RetryableError, TeacherClient, require_same_teacher

_REPORTED = ("step", "slot", "loss", "flops", "teacher_wait_ms", "clips_per_s")
"""What the service's board shows of a line of metrics.jsonl."""


class ServiceTargets:
    """A ``TargetSource`` (student_trainer.target_source) behind a URL."""

    name = "service"

    def __init__(self, url: str, dtype: TargetDtype, client: ServiceClientConfig, run: str) -> None:
        """Waits for the service within the client's retry budget. Raises TeacherUnavailableError."""
        self.dtype: TargetDtype = dtype
        self._config = client
        self._client = TeacherClient(url, client, re.sub(r"[^A-Za-z0-9._-]", "_", run)[:64])
        facts = self._client.teacher()
        if facts["protocol"] != wire.PROTOCOL or dtype not in facts["dtypes"]:
            raise ValueError(
                f"{url} speaks protocol {facts['protocol']} with target dtypes {facts['dtypes']}, expected {wire.PROTOCOL} with {dtype}"
            )
        self.spec = TeacherSpec.from_json({name: facts[name] for name in TeacherSpec.__dataclass_fields__})
        self._pool = ThreadPoolExecutor(client.connections, thread_name_prefix="targets")
        self._board = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._counters = {"need_clip": 0, "clips_up": 0, "corrupt": 0}
        self._lock = threading.Lock()

    def request(self, batch: ClipBatch) -> Future[Float[Tensor, "b n d"]]:
        """See TargetSource."""
        out = torch.zeros(len(batch.digests), self.spec.num_tokens, self.spec.width)
        rows = batch.distinct()
        digests = list(rows)
        size = self._config.request_clips
        parts = [
            self._pool.submit(self._fetch, batch, {digest: rows[digest] for digest in digests[first : first + size]}, out)
            for first in range(0, len(digests), size)
        ]
        return _when_all(parts, out)

    def require(self, spec: TeacherSpec) -> None:
        """See TargetSource."""
        require_same_teacher(self.spec, spec)

    def report(self, line: dict[str, Any]) -> None:
        """Sends a line of metrics to the service's board, in the background; a board that does not take it stops no run."""
        self._board.submit(self._client.progress, {name: line[name] for name in _REPORTED})

    def counters(self) -> dict[str, int]:
        """See TargetSource."""
        return {**asdict(self._client.counters), **self._counters}

    def close(self) -> None:
        """See TargetSource."""
        self._board.shutdown(wait=True)  # the last reports are on their way
        self._client.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, batch: ClipBatch, rows: dict[bytes, list[int]], out: Float[Tensor, "b n d"]) -> None:
        """Fills the rows of ``out``: asks, uploads what is needed, asks again for what another client uploads (DESIGN section 4, HTTP)."""
        asked, needed = dict(rows), set[bytes]()
        while asked:
            request = [
                wire.RequestRow(clip_digest=digest, clip=batch.pixels[numbers[0]].reshape(-1).data if digest in needed else None)
                for digest, numbers in asked.items()
            ]
            self._count("clips_up", len(needed))
            body = wire.write_request(self.dtype, request)
            answers, leased = self._client.retrying(lambda body=body, asked=asked: self._answers(body, asked, out))
            needed = {digest for digest, status in answers.items() if status == "need_clip"} - leased
            asked = {digest: rows[digest] for digest, status in answers.items() if status == "need_clip"}
            self._count("need_clip", len(needed))

    def _answers(
        self, body: Any, asked: dict[bytes, list[int]], out: Float[Tensor, "b n d"]
    ) -> tuple[dict[bytes, wire.Status], set[bytes]]:
        """The status of each digest, and the leased ones; targets are decoded into ``out``. Raises RetryableError for damaged bytes."""
        answer = self._client.targets(body, self.spec.fingerprint)
        try:
            header, answered = wire.read_response(answer)
        except ValueError as error:
            self._count("corrupt")
            raise RetryableError(f"a damaged answer: {error}") from error
        self._check(header, answered, asked)
        for row in answered:
            if row.encoded is not None:
                first, *others = asked[row.clip_digest]
                try:
                    codec.decode_into(out[first], row.encoded, self.dtype)
                except codec.CorruptTargetError as error:
                    self._count("corrupt")
                    raise RetryableError(f"clip {row.clip_digest.hex()[:12]}: {error}") from error
                for number in others:
                    out[number] = out[first]
        leased = {answered[number].clip_digest for number in header.leased}
        return {row.clip_digest: row.status for row in answered}, leased

    def _check(self, header: wire.ResponseHeader, answered: list[wire.ResponseRow], asked: dict[bytes, list[int]]) -> None:
        """Raises TeacherMismatchError, and ValueError where rows are not the ones asked for or were refused."""
        require_same_teacher(replace(self.spec, fingerprint=header.fingerprint, compute=header.compute), self.spec)
        if header.target_dtype != self.dtype or header.shape != (self.spec.num_tokens, self.spec.width):
            raise ValueError(
                f"got {header.target_dtype} targets of {header.shape}, expected {self.dtype} of {(self.spec.num_tokens, self.spec.width)}"
            )
        if sorted(row.clip_digest for row in answered) != sorted(asked):
            raise RetryableError(f"got answers for {len(answered)} clips that are not the {len(asked)} asked for")
        for row in answered:
            if row.status in ("bad_digest", "bad_shape"):
                raise RetryableError(f"clip {row.clip_digest.hex()[:12]} arrived damaged: {row.status}")

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counters[name] += amount


def _when_all(parts: list[Future[None]], out: Float[Tensor, "b n d"]) -> Future[Float[Tensor, "b n d"]]:
    """A future of ``out`` when every part of it is filled, or of the first failure."""
    whole: Future[Float[Tensor, "b n d"]] = Future()
    left, lock = len(parts), threading.Lock()

    def ended(part: Future[None]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if whole.done():
                return
            if part.cancelled():
                whole.set_exception(ConnectionError("the target source was closed"))
            elif (error := part.exception()) is not None:
                whole.set_exception(error)
            elif left == 0:
                whole.set_result(out)

    for part in parts:
        part.add_done_callback(ended)
    if not parts:
        whole.set_result(out)
    return whole
