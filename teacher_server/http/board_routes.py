"""The routes of the board: the student runs, and the end of a service."""

import asyncio

import pydantic
from fastapi import FastAPI, Request

from salt_distill.common.protocol import (
    MAX_JSON_BYTES,
    BoardRun,
    BoardRunDetail,
    EndingAnswer,
    HttpStatus,
    Progress,
    Route,
    ServedHistory,
    Standing,
)
from salt_distill.teacher_server.board.board import Ending
from salt_distill.teacher_server.http.errors import ApiError, malformed
from salt_distill.teacher_server.http.front import RequestRecord
from salt_distill.teacher_server.http.incoming import (
    announced_bytes,
    read_body,
    require_type,
    run_id,
    share_of,
)
from salt_distill.teacher_server.http.replica import TeacherService

_JSON = "application/json"
_PROGRESS = {"requestBody": {"required": True, "content": {_JSON: {"schema": Progress.model_json_schema()}}}}
_COMMAND = {"requestBody": {"required": False, "content": {_JSON: {"schema": {"type": "object"}}}}}
"""Of the OpenAPI page: these bodies are read by ourselves, in a bounded size and time."""


def add_board_routes(app: FastAPI, service: TeacherService) -> None:
    """Adds them to a service's app."""

    @app.get(Route.RUNS)
    async def runs() -> list[BoardRun]:
        """The student runs, the one heard of last first."""
        return await service.board.runs()

    @app.get(Route.RUN)
    async def run_in_detail(run: str) -> BoardRunDetail:
        """One of them, with its configuration, and its loss against steps and FLOPs."""
        detail = await service.board.run(run_id(run))
        if detail is None:
            raise ApiError(
                HttpStatus.NOT_FOUND,
                "the board knows no such run",
                expected=f"an id of GET {Route.RUNS}",
                got=run,
                hint=f"see GET {Route.RUNS}",
            )
        return detail

    @app.get(Route.HISTORY)
    async def history() -> ServedHistory:
        """How many targets all replicas had sent, every few seconds of the last hour."""
        return await service.board.history()

    @app.post(Route.PROGRESS, openapi_extra=_PROGRESS)
    async def progress(run: str, request: Request) -> Standing:
        """Where a student run is; answers where that is in its group, and whether it is to wait for the
        others."""
        record: RequestRecord = request.state.record
        record.run = run_id(run)
        record.token.require_run(run)
        report = await _report(request, service.config.body_timeout_s)
        record.token.require_group(report.group)
        return await service.board.post(run, report, token=share_of(record.token, run).token or "")

    @app.post(Route.DRAIN, openapi_extra=_COMMAND)
    async def drain(request: Request) -> EndingAnswer:
        """From now on no request for targets is begun, on any replica; those that were are answered."""
        return await _end(service, request, Ending.DRAIN)

    @app.post(Route.STOP, openapi_extra=_COMMAND)
    async def stop(request: Request) -> EndingAnswer:
        """Drains the service, and then ends the `salt-serve teacher` that it belongs to."""
        return await _end(service, request, Ending.STOP)


async def _end(service: TeacherService, request: Request, ending: Ending) -> EndingAnswer:
    require_type(request, _JSON, hint="a form of a web page cannot send it; the body may be empty")
    await service.end(ending)
    return EndingAnswer(ending=service.ending.word)


async def _report(request: Request, timeout_s: float) -> Progress:
    """The body of a progress report, bounded in size and time, parsed away from the event loop. Raises
    ApiError."""
    require_type(request, _JSON, hint="send the report as JSON")
    announced_bytes(request, MAX_JSON_BYTES)
    body = await read_body(
        request, max_bytes=MAX_JSON_BYTES, timeout_s=timeout_s, take=lambda num_bytes: None
    )
    try:
        return await asyncio.to_thread(Progress.model_validate_json, bytes(body))
    except pydantic.ValidationError as error:
        raise malformed(error.errors(include_url=False)) from error
