"""The teacher service as a plain ASGI app (DESIGN section 4, HTTP): its routes around a replica."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from salt_distill.common.config import ServiceConfig
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.protocol import (
    ARROW_TYPE,
    PROTOCOL,
    Alive,
    ErrorBody,
    Header,
    HttpStatus,
    Ready,
    Route,
    TeacherFacts,
)
from salt_distill.common.targets import codec
from salt_distill.common.targets.manifest import CacheSpec
from salt_distill.teacher_server.board.board import Board
from salt_distill.teacher_server.http.access import Tokens
from salt_distill.teacher_server.http.board_routes import add_board_routes
from salt_distill.teacher_server.http.errors import add_error_handlers
from salt_distill.teacher_server.http.front import Front, RequestLog
from salt_distill.teacher_server.http.metrics import exposition
from salt_distill.teacher_server.http.pages import docs_page, status_page
from salt_distill.teacher_server.http.replica import ReplicaContext, TeacherService
from salt_distill.teacher_server.http.targets import TargetsRoute
from salt_distill.teacher_server.sharing.batching import FrozenTeacher
from salt_distill.teacher_server.sharing.disk import DiskTargets

_TARGETS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {ARROW_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    },
    "parameters": [
        {"in": "header", "name": header, "description": header.meaning, "schema": {"type": "string"}}
        for header in (Header.RUN, Header.TEACHER, Header.DEADLINE_MS, Header.BUCKET, Header.RETRY)
    ],
    "responses": {
        "200": {
            "description": "An Arrow IPC stream: a row for each row of the request.",
            "content": {ARROW_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
}
"""Of its OpenAPI page: what FastAPI cannot see, since the bodies are no JSON."""


def build_app(
    teacher: FrozenTeacher,
    config: ServiceConfig,
    context: ReplicaContext | None = None,
    cache: Path | None = None,
    *,
    tokens: Path | None = None,
    request_log: Path | None = None,
) -> FastAPI:
    """The app around a teacher; ``app.state.service`` is its ``TeacherService``. ``cache``: the folder that
    targets are written to.

    ``context``: where it stands among other replicas; None: it is the only one. ``tokens``: the file of
    access tokens; None: everybody may ask. ``request_log``: the file that requests are written to.
    """
    known_tokens = None if tokens is None else Tokens(tokens)
    log = None if request_log is None else RequestLog(request_log)
    disk = None if cache is None else _open_cache(cache, teacher.spec, config)
    board_alone = ReplicaContext(board=Board(**board_arguments(teacher.spec, config)))
    service = TeacherService(teacher, config, context or board_alone, disk, known_tokens, log)
    responses: dict[int | str, dict[str, Any]] = {
        int(status): {"model": ErrorBody, "description": status.meaning} for status in HttpStatus
    }
    app = FastAPI(
        title="SALT teacher",
        version=PROTOCOL,
        lifespan=service.lifespan,
        responses=responses,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(_Counted, service=service)
    add_error_handlers(app)
    app.add_middleware(
        Front,
        peers=service.peers,
        tokens=known_tokens,
        hosts=config.hosts,
        metrics=service.batcher.counters,
        log=log,
    )
    add_board_routes(app, service)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: TeacherService) -> None:
    """Those of the teacher, of health and of what people see."""
    answer_targets = TargetsRoute(service)

    @app.get(Route.TEACHER)
    async def teacher_facts() -> TeacherFacts:
        """Which teacher this is, how it runs, what it takes, and what it has done."""
        return await service.facts()

    @app.post(Route.TARGETS, openapi_extra=_TARGETS, response_class=Response)
    async def targets(request: Request) -> Response:
        """Targets of clips: an Arrow IPC stream of `clip_digest`, `clip` (null: "do you have it?") and
        optionally `token_idx`."""
        return await answer_targets(request)

    @app.get(Route.ALIVE)
    async def alive() -> Alive:
        """The process answers and its parts run."""
        service.check()
        return Alive()

    @app.get(Route.READY)
    async def ready() -> Ready:
        """Weights are loaded and one forward is done."""
        service.require_ready()
        return Ready()

    @app.get(Route.METRICS, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """All replicas' counters, and the runs, for Prometheus."""
        text = exposition(service.spec, await service.all_metrics(), await service.board.runs())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get(Route.PAGE, include_in_schema=False)
    async def page() -> HTMLResponse:
        return status_page()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return docs_page(app.openapi())


class _Counted:
    """An app whose requests for targets are counted until their answers are sent, so that a drained one cuts
    none off."""

    def __init__(self, app: ASGIApp, service: TeacherService) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = int(
            scope["type"] == "http" and scope["path"].endswith(Route.TARGETS) and not self._service.ending
        )
        self._service.open_requests += begun
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.open_requests -= begun


def board_arguments(spec: TeacherSpec, config: ServiceConfig) -> dict[str, Any]:
    """What a board needs to know of a teacher."""
    window_clips = config.memory_bytes // codec.num_bytes("float16", spec.num_tokens, spec.width)
    limits = {
        "max_runs": config.max_runs,
        "group_timeout_s": config.group_timeout_s,
        "window_clips": window_clips,
    }
    return {**limits, "teacher": spec.fingerprint}


def _open_cache(root: Path, spec: TeacherSpec, config: ServiceConfig) -> DiskTargets:
    kind = CacheSpec(teacher=spec, target_dtype=config.cache_dtype, shape=(spec.num_tokens, spec.width))
    return DiskTargets(root, kind, segment_bytes=config.segment_bytes)
