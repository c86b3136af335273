"""Targets of a teacher service: what the service lacks is uploaded, what it has is only asked for."""

import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from pydantic import JsonValue
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import ServiceClientConfig, TargetDtype
from salt_distill.common.metrics_line import MetricsLine
from salt_distill.common.model.masking import MaskGroup
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.protocol import PROTOCOL, RowStatus
from salt_distill.common.targets import codec, wire
from salt_distill.student_trainer.targets.client import ServiceClient, require_same_teacher
from salt_distill.student_trainer.targets.group import GroupMember
from salt_distill.student_trainer.targets.host_memory import new_targets
from salt_distill.student_trainer.targets.kept_targets import KeptTargets
from salt_distill.student_trainer.targets.retry import RetryableError


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one request asks for."""

    batch: ClipBatch
    rows: dict[bytes, list[int]]
    """Rows of ``batch`` and ``out`` by digest."""
    tokens: dict[bytes, Int[np.ndarray, " k"]] | None
    """Of each clip, the tokens to ask for; None: all."""
    bucket: int | None
    out: Shaped[Tensor, "b n packed"]
    slots: range
    """From the first clip's to the last one's, in the data order."""


class ServiceTargets:
    """A ``TargetSource`` (salt_distill.student_trainer.targets.source) behind a URL."""

    name = "service"
    clip_flops = 0.0

    def __init__(
        self,
        url: str,
        dtype: TargetDtype,
        client: ServiceClientConfig,
        run: str,
        *,
        for_ever: bool = False,
        masked: bool = False,
        group: str | None = None,
        cache: str | None = None,
        rank: int = 0,
        shown: dict[str, JsonValue] | None = None,
        num_steps: int | None = None,
        token: str | None = None,
        ca: str | None = None,
    ) -> None:
        """Waits for the service within the client's retry budget, or ``for_ever``. ``masked``: only hidden
        tokens travel. ``shown``: what the service's board shows of the run's configuration; ``num_steps``: of
        its length. ``token``, ``ca``: see ServiceClient.

        ``group``: see Note [groups]. ``rank``: of several that ask for parts of one run's batches. ``cache``:
        folder that keeps what the service gives, and is looked into before it is asked. Raises
        TeacherUnavailableError.
        """
        self.dtype: TargetDtype = dtype
        self._config, self._masked = client, masked
        self._client = ServiceClient(
            url, client, re.sub(r"[^A-Za-z0-9._-]", "_", run)[:64], for_ever=for_ever, token=token, ca=ca
        )
        facts = self._client.teacher()
        if facts.protocol != PROTOCOL or dtype not in facts.dtypes:
            raise ValueError(
                f"{url} speaks protocol {facts.protocol} with target dtypes {facts.dtypes}, expected"
                f" {PROTOCOL} with {dtype}"
            )
        self._buckets = facts.buckets
        self.spec = TeacherSpec(**facts.model_dump(include={field.name for field in fields(TeacherSpec)}))
        self._kept = (
            None
            if cache is None
            else KeptTargets(cache, self.spec, dtype, segment_bytes=client.segment_bytes)
        )
        self._pool = ThreadPoolExecutor(client.connections, thread_name_prefix="targets")
        self._probes = ThreadPoolExecutor(1, thread_name_prefix="probe")
        self._probe: Future[None] | None = None
        self._member = GroupMember(self._client, group, rank, shown, num_steps=num_steps)
        self._counters = {"need_clip": 0, "clips_up": 0, "corrupt": 0}
        self._lock = threading.Lock()

    def request(
        self, batch: ClipBatch, *, masks: Sequence[MaskGroup] = (), slot: int = 0
    ) -> Future[Shaped[Tensor, "b n packed"]]:
        """See TargetSource."""
        if self._client.retries.is_open and (self._probe is None or self._probe.done()):
            self._probe = self._probes.submit(self._client.probe)
        out = new_targets(batch, self.spec, self.dtype)
        tokens = _hidden(batch, masks, self.spec.num_tokens) if self._masked and masks else None
        parts = []
        for bucket, rows in self._bodies(batch.distinct()):
            numbers = [number for numbers in rows.values() for number in numbers]
            slots = range(slot + min(numbers), slot + max(numbers) + 1)
            parts.append(_Part(batch=batch, rows=rows, tokens=tokens, bucket=bucket, out=out, slots=slots))
            self._member.lacks(slots.start)
        parts.sort(key=lambda part: part.slots.start)
        return _when_all([self._pool.submit(self._fill, part) for part in parts], out)

    def report(self, line: MetricsLine, *, is_last: bool = False) -> None:
        """Sends a line of metrics to the service's board, in the background; a board that does not take it
        stops no run."""
        self._member.report(line, is_last=is_last)

    def metrics(self) -> dict[str, float]:
        """See TargetSource."""
        return self._member.metrics()

    def counters(self) -> dict[str, int | float]:
        """See TargetSource."""
        cache_counters = {} if self._kept is None else self._kept.counters()
        return {
            **asdict(self._client.counters),
            **asdict(self._client.retries.counters()),
            **self._counters,
            **cache_counters,
            **self._member.metrics(),
        }

    def close(self) -> None:
        """See TargetSource."""
        self._member.close()
        self._client.close()
        self._probes.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._kept is not None:
            self._kept.close()

    def _bodies(self, rows: dict[bytes, list[int]]) -> Iterator[tuple[int | None, dict[bytes, list[int]]]]:
        """The rows of each request and its bucket. A bucket's clips always reach the same replica of the
        service."""
        buckets: dict[int | None, list[bytes]] = {}
        for digest in rows:
            bucket = None if self._buckets == 1 else int.from_bytes(digest[:4], "big") % self._buckets
            buckets.setdefault(bucket, []).append(digest)
        size = self._config.request_clips
        for bucket, digests in buckets.items():
            for first in range(0, len(digests), size):
                yield bucket, {digest: rows[digest] for digest in digests[first : first + size]}

    def _fill(self, part: _Part) -> None:
        try:
            self._member.hold(part.slots.stop)
            self._fetch(part)
        finally:
            self._member.has(part.slots.start)

    def _fetch(self, part: _Part) -> None:
        """Fills the part's rows: asks, uploads what is needed, asks again for what another client uploads
        (DESIGN section 4, HTTP)."""
        asked, needed = [digest for digest in part.rows if not self._is_kept(digest, part)], set[bytes]()
        while asked:
            request = [
                wire.RequestRow(
                    clip_digest=digest,
                    clip=(
                        part.batch.pixels[part.rows[digest][0]].reshape(-1).data if digest in needed else None
                    ),
                    token_idx=None if part.tokens is None else part.tokens[digest],
                )
                for digest in asked
            ]
            self._count("clips_up", len(needed))
            body = wire.write_request(self.dtype, request)
            answers, leased = self._client.retries(
                lambda body=body, asked=asked: self._answers(body, asked, part)
            )
            needed = {digest for digest, status in answers.items() if status == "need_clip"} - leased
            asked = [digest for digest, status in answers.items() if status == "need_clip"]
            self._count("need_clip", len(needed))

    def _is_kept(self, clip_digest: bytes, part: _Part) -> bool:
        """Whether a clip's rows could be filled from the cache."""
        encoded = None if self._kept is None else self._kept.find(clip_digest)
        if encoded is None:
            return False
        for row in part.rows[clip_digest]:
            codec.pack_into(part.out[row], encoded, self.dtype)
        return True

    def _answers(
        self, body: Any, asked: list[bytes], part: _Part
    ) -> tuple[dict[bytes, RowStatus], set[bytes]]:
        """The status of each digest, and the leased ones; targets are put into ``part.out``. Raises
        RetryableError for damaged bytes."""
        target_bytes = codec.num_bytes(self.dtype, self.spec.num_tokens, self.spec.width)
        most = wire.max_response_bytes(len(asked), target_bytes)
        answer = self._client.targets(body, self.spec.fingerprint, max_bytes=most, bucket=part.bucket)
        try:
            header, answered = wire.read_response(answer)
        except ValueError as error:
            self._count("corrupt")
            raise RetryableError(f"a damaged answer: {error}") from error
        self._check(header, answered, asked)
        for row in answered:
            if row.encoded is not None:
                first, *others = part.rows[row.clip_digest]
                token_idx = None if part.tokens is None else part.tokens[row.clip_digest]
                try:
                    codec.pack_into(part.out[first], row.encoded, self.dtype, token_idx)
                except codec.CorruptTargetError as error:
                    self._count("corrupt")
                    raise RetryableError(f"clip {row.clip_digest.hex()[:12]}: {error}") from error
                for number in others:
                    part.out[number] = part.out[first]
                if self._kept is not None:
                    self._kept.add(row.clip_digest, row.encoded)
        leased = {answered[number].clip_digest for number in header.leased}
        return {row.clip_digest: row.status for row in answered}, leased

    def _check(
        self, header: wire.ResponseHeader, answered: list[wire.ResponseRow], asked: list[bytes]
    ) -> None:
        """Raises TeacherMismatchError, and ValueError where rows are not the ones asked for or were
        refused."""
        require_same_teacher(
            replace(self.spec, fingerprint=header.fingerprint, compute=header.compute), self.spec
        )
        if header.target_dtype != self.dtype or header.shape != (self.spec.num_tokens, self.spec.width):
            raise ValueError(
                f"got {header.target_dtype} targets of {header.shape}, expected {self.dtype} of"
                f" {(self.spec.num_tokens, self.spec.width)}"
            )
        if not all(0 <= number < len(answered) for number in header.leased):
            raise RetryableError(f"got leases of rows {header.leased}, expected some of {len(answered)}")
        if sorted(row.clip_digest for row in answered) != sorted(asked):
            raise RetryableError(
                f"got answers for {len(answered)} clips that are not the {len(asked)} asked for"
            )
        for row in answered:
            if row.status in ("bad_digest", "bad_shape"):
                raise RetryableError(f"clip {row.clip_digest.hex()[:12]} arrived damaged: {row.status}")

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counters[name] += amount


def _hidden(
    batch: ClipBatch, masks: Sequence[MaskGroup], num_tokens: int
) -> dict[bytes, Int[np.ndarray, " k"]]:
    """For each distinct clip the tokens that the masks of its rows hide."""
    hidden = [token_idx for group in masks for token_idx in group.hidden_by_any(num_tokens)]
    return {
        digest: np.unique(np.concatenate([hidden[row] for row in rows]))
        for digest, rows in batch.distinct().items()
    }


def _when_all(
    parts: list[Future[None]], out: Shaped[Tensor, "b n packed"]
) -> Future[Shaped[Tensor, "b n packed"]]:
    """A future of ``out`` when every part of it is filled, or of the first failure."""
    whole: Future[Shaped[Tensor, "b n packed"]] = Future()
    remaining, lock = len(parts), threading.Lock()

    def ended(part: Future[None]) -> None:
        nonlocal remaining
        with lock:
            remaining -= 1
            if whole.done():
                return
            if part.cancelled():
                whole.set_exception(ConnectionError("the target source was closed"))
            elif (error := part.exception()) is not None:
                whole.set_exception(error)
            elif remaining == 0:
                whole.set_result(out)

    for part in parts:
        part.add_done_callback(ended)
    if not parts:
        whole.set_result(out)
    return whole
