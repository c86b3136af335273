"""The teacher service as a plain ASGI app (DESIGN section 4, HTTP): its routes around a replica."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.config import ServiceConfig
from common.model.teacher import TeacherSpec
from common.targets import codec, wire
from common.targets.store import CacheSpec
from teacher_server.batching import FrozenTeacher
from teacher_server.board import Board
from teacher_server.board_routes import add_board_routes
from teacher_server.counters import GAUGES
from teacher_server.disk import DiskTargets
from teacher_server.errors import add_error_handlers
from teacher_server.replica import Place, TeacherService

PAGE = Path(__file__).parent / "page" / "index.html"


def build_app(teacher: FrozenTeacher, config: ServiceConfig, place: Place | None = None, cache: Path | None = None) -> FastAPI:
    """The app around a teacher; ``app.state.service`` is its ``TeacherService``. ``cache``: the folder that targets are written to.

    ``place``: where it stands among other replicas; None: it is the only one.
    """
    disk = None if cache is None else _open_cache(cache, teacher.spec, config)
    service = TeacherService(teacher, config, place or Place(board=Board(**board_arguments(teacher.spec, config))), disk)
    app = FastAPI(title="SALT teacher", version=wire.PROTOCOL, lifespan=service.lifespan)
    app.state.service = service
    app.add_middleware(_Counted, service=service)
    add_error_handlers(app)
    add_board_routes(app, service)

    @app.get("/v1/teacher")
    async def teacher_facts() -> dict[str, Any]:
        """Which teacher this is, how it runs, what it takes, and what it has done."""
        return await service.describe()

    body = {"requestBody": {"required": True, "content": {wire.CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}}}}

    @app.post("/v1/targets", openapi_extra=body, response_class=Response)
    async def targets(request: Request) -> Response:
        """Targets of clips: an Arrow IPC stream of `clip_digest`, `clip` (null: "do you have it?") and optionally `token_idx`."""
        return await service.targets(request)

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
        return await prometheus(service)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html")

    return app


class _Counted:
    """An app whose requests for targets are counted until their answers are sent, so that a drained one cuts none off."""

    def __init__(self, app: ASGIApp, service: TeacherService) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = int(scope["type"] == "http" and scope["path"].endswith("/v1/targets") and not self._service.ending)
        self._service.open_requests += begun
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.open_requests -= begun


async def prometheus(service: TeacherService) -> str:
    """The counters of this replica, and what the runs were sent by all, in Prometheus' text format."""
    lines = []
    for name, value in {**service.counters(), "ready": int(service.ready)}.items():
        is_gauge = name in GAUGES or name == "ready"
        full = f"salt_{name}" if is_gauge else f"salt_{name}_total"
        lines += [f"# TYPE {full} {'gauge' if is_gauge else 'counter'}", f"{full} {value}"]
    lines.append("# TYPE salt_run_clips_served_total counter")
    lines += [f'salt_run_clips_served_total{{run="{run["id"]}"}} {run["clips_served"]}' for run in await service.board.runs()]
    return "\n".join(lines) + "\n"


def board_arguments(spec: TeacherSpec, config: ServiceConfig) -> dict[str, Any]:
    """What a board needs to know of a teacher."""
    window_clips = config.memory_bytes // codec.num_bytes("float16", spec.num_tokens, spec.width)
    limits = {"max_runs": config.max_runs, "group_timeout_s": config.group_timeout_s, "window_clips": window_clips}
    return {**limits, "teacher": spec.fingerprint}


def _open_cache(root: Path, spec: TeacherSpec, config: ServiceConfig) -> DiskTargets:
    kind = CacheSpec(teacher=spec.to_json(), target_dtype=config.cache_dtype, shape=(spec.num_tokens, spec.width))
    return DiskTargets(root, kind, segment_bytes=config.segment_bytes)
