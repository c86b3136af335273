"""What a client did wrong, as JSON: ``{error, expected, got, hint}`` (DESIGN section 4, HTTP)."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from salt_distill.common.protocol import Header

log = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is refused."""

    def __init__(
        self,
        status: int,
        error: str,
        *,
        expected: Any,
        got: Any,
        hint: str,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{error}: got {got}, expected {expected}")
        self.status = status
        self.body = {"error": error, "expected": expected, "got": got, "hint": hint}
        self.headers = dict(headers or {}) | (
            {} if retry_after_s is None else {"Retry-After": f"{retry_after_s:g}"}
        )

    def response(self) -> Response:
        """What the client reads."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of an app a JSON one."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        body = {
            "error": f"{place}: {first['msg']}",
            "expected": "a body as /docs describes it",
            "got": repr(first["input"])[:200],
        }
        return JSONResponse(
            {**body, "hint": "every wrong value is an error, unknown keys too"}, status_code=422
        )

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        body = {
            "error": str(error.detail),
            "expected": "a route of /docs",
            "got": f"{request.method} {request.url.path}",
        }
        return JSONResponse(
            {**body, "hint": "see /docs"}, status_code=error.status_code, headers=error.headers
        )

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # for the log and the metrics: nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # Starlette raises the error again after this answer, so it is in the server's log with its traceback.
        note = request.state.note
        log.error("request %s of run %s failed: %s", note.request, note.run, error)
        body = {"error": f"the teacher failed: {error}", "expected": "targets", "got": type(error).__name__}
        hint = "see the server's log; the request may be repeated"
        return JSONResponse({**body, "hint": hint}, status_code=500, headers={Header.REQUEST: note.request})
