"""The teacher service as a plain ASGI app: request to batch to forward to bytes (DESIGN section 4, HTTP)."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse

from common.config import ServiceConfig
from common.targets import codec, wire
from teacher_server.batching import Batcher, BusyError, FrozenTeacher
from teacher_server.board import Board, Progress
from teacher_server.errors import ApiError, add_error_handlers
from teacher_server.exchange import Answer, Exchange
from teacher_server.leases import Leases

PAGE = Path(__file__).parent / "page" / "index.html"
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class TeacherService:
    """One replica: a teacher, and everything its requests share."""

    def __init__(self, teacher: FrozenTeacher, config: ServiceConfig, board_file: Path | None = None) -> None:
        self._config = config
        self.spec = teacher.spec
        self.batch_size = int(self.spec.compute["batch_size"])
        self.batcher = Batcher(
            teacher,
            batch_size=self.batch_size,
            batch_wait_s=config.batch_wait_ms / 1000,
            memory_bytes=config.memory_bytes,
            max_pending_bytes=config.max_pending_bytes,
        )
        self.leases = Leases(config.lease_s)
        self.board = Board(config.max_runs, board_file)
        self._exchange = Exchange(self.batcher, self.leases, self.spec.clip_shape)
        self._tasks: list[asyncio.Task[None]] = []
        self.ready = False

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Serves between its two ends; readiness comes after the first forward, which does not delay liveness."""
        self._tasks = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self._warm_up())]
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def check(self) -> None:
        """Raises what ended the batcher or the first forward, if something did."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    def require_ready(self) -> None:
        """Raises ApiError 503 before the first forward is done, and what ``check`` raises."""
        self.check()
        if not self.ready:
            raise ApiError(
                503,
                "the teacher is not ready",
                expected="a teacher that has done its first forward",
                got="one that starts",
                hint="ask again after Retry-After",
                retry_after_s=self._config.retry_after_s,
            )

    async def _warm_up(self) -> None:
        await self.batcher.warm_up()
        self.ready = True

    def describe(self) -> dict[str, Any]:
        """``GET /v1/teacher``."""
        spec = self.spec.to_json()
        limits = {"max_request_bytes": self._config.max_request_bytes, "lease_s": self._config.lease_s}
        shared = {"protocol": wire.PROTOCOL, "dtypes": list(codec.TARGET_DTYPES), "batch_size": self.batch_size}
        return {**spec, **shared, "limits": limits, "ready": self.ready, "counters": self.counters()}

    def counters(self) -> dict[str, int | float]:
        """What this replica has done, and what it holds now."""
        memory = self.batcher.memory
        held = {"memory_clips": len(memory), "memory_bytes": memory.num_bytes, "leases": len(self.leases)}
        return {**self.batcher.counters.to_json(), **held, "queued_clips": self.batcher.queued_clips}

    async def targets(self, request: Request) -> Response:
        """``POST /v1/targets``."""
        self._check_headers(request)
        run = run_id(request.headers.get("x-salt-run", "unnamed"))
        length = int(request.headers.get("content-length", 0))
        if length > self._config.max_request_bytes:
            raise self._too_large(length)
        try:
            with self.batcher.admit(length):
                body = await self._read(request)
                parsed = await asyncio.to_thread(self._parse, body)
        except BusyError as error:
            raise ApiError(
                429,
                str(error),
                expected=f"at most {self._config.max_pending_bytes} bytes",
                got=f"{length} bytes more",
                hint="ask again after Retry-After",
                retry_after_s=self._config.retry_after_s,
            ) from error
        counters = self.batcher.counters
        counters.requests += 1
        counters.bytes_in += len(body)
        answer = await self._exchange.answer(parsed, run)
        response = await asyncio.to_thread(self._serialise, parsed, answer)
        counters.bytes_out += len(response)
        self.board.served(run, clips=sum(row.status == "ok" for row in answer.rows), num_bytes=len(response))
        return Response(response, media_type=wire.CONTENT_TYPE)

    def _check_headers(self, request: Request) -> None:
        self.require_ready()
        fingerprint = request.headers.get("x-salt-teacher", self.spec.fingerprint)
        if fingerprint != self.spec.fingerprint:
            hint = "this URL serves another teacher: correct the URL, or start a new run"
            raise ApiError(409, "another teacher is served here", expected=fingerprint, got=self.spec.fingerprint, hint=hint)
        content_type = request.headers.get("content-type", "")
        if content_type.split(";")[0].strip() != wire.CONTENT_TYPE:
            raise ApiError(415, "the body is not Arrow", expected=wire.CONTENT_TYPE, got=content_type, hint="send an Arrow IPC stream")

    async def _read(self, request: Request) -> bytearray:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._config.max_request_bytes:
                raise self._too_large(len(body))
        return body

    def _too_large(self, got_bytes: int) -> ApiError:
        expected = f"at most {self._config.max_request_bytes} bytes"
        return ApiError(413, "the body is too large", expected=expected, got=f"{got_bytes} bytes", hint="send fewer clips in a request")

    def _parse(self, body: bytearray) -> wire.Request:
        try:
            request = wire.read_request(body)
            for row in request.rows:
                if row.token_idx is not None and row.token_idx[-1] >= self.spec.num_tokens:
                    raise ValueError(f"got token_idx up to {row.token_idx[-1]}, expected less than the teacher's {self.spec.num_tokens}")
        except ValueError as error:
            hint = "the columns and their types are those of protocol version 1"
            raise ApiError(422, str(error), expected="a request for targets", got="a malformed one", hint=hint) from error
        return request

    def _serialise(self, request: wire.Request, answer: Answer) -> bytes:
        header = wire.ResponseHeader(
            target_dtype=request.target_dtype,
            fingerprint=self.spec.fingerprint,
            compute=self.spec.compute,
            shape=(self.spec.num_tokens, self.spec.width),
            leased=answer.leased,
        )
        rows = [self._cut(asked, row) for asked, row in zip(request.rows, answer.rows, strict=True)]
        return wire.write_response(header, rows).to_pybytes()  # bytes: Ray Serve's proxy pickles the messages of an app

    def _cut(self, asked: wire.RequestRow, row: wire.ResponseRow) -> wire.ResponseRow:
        """The row with only the tokens that were asked for."""
        if asked.token_idx is None or row.encoded is None:
            return row
        encoded = codec.take_tokens(row.encoded, asked.token_idx, num_tokens=self.spec.num_tokens)
        return wire.ResponseRow(clip_digest=row.clip_digest, status=row.status, encoded=encoded)


def build_app(teacher: FrozenTeacher, config: ServiceConfig, board_file: Path | None = None) -> FastAPI:
    """The app around a teacher; ``app.state.service`` is its ``TeacherService``."""
    service = TeacherService(teacher, config, board_file)
    app = FastAPI(title="SALT teacher", version=wire.PROTOCOL, lifespan=service.lifespan)
    app.state.service = service
    add_error_handlers(app)

    @app.get("/v1/teacher")
    async def teacher_facts() -> dict[str, Any]:
        """Which teacher this is, how it runs, what it takes, and what it has done."""
        return service.describe()

    body = {"requestBody": {"required": True, "content": {wire.CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}}}}

    @app.post("/v1/targets", openapi_extra=body, response_class=Response)
    async def targets(request: Request) -> Response:
        """Targets of clips: an Arrow IPC stream of `clip_digest`, `clip` (null: "do you have it?") and optionally `token_idx`."""
        return await service.targets(request)

    @app.get("/v1/runs")
    async def runs() -> list[dict[str, Any]]:
        """The student runs, the one heard of last first."""
        return service.board.runs()

    @app.post("/v1/runs/{run}/progress", status_code=204)
    async def progress(run: str, progress: Progress) -> None:
        """Where a student run is."""
        await asyncio.to_thread(service.board.post, run_id(run), progress)

    @app.get("/healthz")
    async def alive() -> dict[str, bool]:
        """The process answers and its parts run."""
        service.check()
        return {"alive": True}

    @app.get("/readyz")
    async def ready() -> dict[str, bool]:
        """Weights are loaded and one forward is done."""
        service.require_ready()
        return {"ready": True}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Prometheus text."""
        return prometheus(service)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html")

    return app


def run_id(run: str) -> str:
    """A run's id, checked: it becomes a key and a label."""
    if _RUN_ID.fullmatch(run) is None:
        hint = "the X-Salt-Run header, or the path of a progress report"
        raise ApiError(422, "the run's id is malformed", expected="1 to 64 of A-Z a-z 0-9 . _ -", got=run[:100], hint=hint)
    return run


def prometheus(service: TeacherService) -> str:
    """The counters in Prometheus' text format."""
    gauges = {"batch_fill", "queued_clips", "memory_clips", "memory_bytes", "leases"}
    lines = []
    for name, value in {**service.counters(), "ready": int(service.ready)}.items():
        is_gauge = name in gauges or name == "ready"
        full = f"salt_{name}" if is_gauge else f"salt_{name}_total"
        lines += [f"# TYPE {full} {'gauge' if is_gauge else 'counter'}", f"{full} {value}"]
    lines.append("# TYPE salt_run_clips_served_total counter")
    lines += [f'salt_run_clips_served_total{{run="{run["id"]}"}} {run["clips_served"]}' for run in service.board.runs()]
    return "\n".join(lines) + "\n"
