"""What a client did wrong, as JSON: ``{error, expected, got, hint}`` (DESIGN section 4, HTTP)."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from salt_distill.common.config.wrong_values import at
from salt_distill.common.protocol import ErrorBody, Header, HttpStatus
from salt_distill.teacher_server.board.link import BoardAwayError

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is refused."""

    def __init__(
        self,
        status: int,
        error: str,
        *,
        expected: str,
        got: str,
        hint: str,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{error}: got {got}, expected {expected}")
        self.status = status
        self.body = ErrorBody(error=error, expected=expected, got=got, hint=hint)
        self.headers = dict(headers or {}) | (
            {} if retry_after_s is None else {"Retry-After": f"{retry_after_s:g}"}
        )

    def response(self) -> Response:
        """What the client reads."""
        return JSONResponse(self.body.model_dump(), status_code=self.status, headers=self.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of an app a JSON one."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def wrong_values(request: Request, error: RequestValidationError) -> Response:
        return malformed(error.errors()).response()

    @app.exception_handler(BoardAwayError)
    async def without_board(request: Request, error: BoardAwayError) -> Response:
        return ApiError(
            HttpStatus.NOT_READY,
            str(error),
            expected="a board that keeps the student runs",
            got="none within seconds",
            hint="ask again after Retry-After; targets are answered meanwhile",
            retry_after_s=1.0,
        ).response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return ApiError(
            error.status_code,
            str(error.detail),
            expected="a route of /docs",
            got=f"{request.method} {request.url.path}"[:200],
            hint="see /docs",
            headers=error.headers,
        ).response()

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # for the log and the metrics: nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # Starlette raises the error again after this answer, so it is in the server's log with its traceback.
        record = request.state.record
        logger.error("request %s of run %s failed: %s", record.request, record.run, error)
        return ApiError(
            HttpStatus.FAILED,
            f"the teacher failed: {error}",
            expected="targets",
            got=type(error).__name__,
            hint="see the server's log; the request may be repeated",
            headers={Header.REQUEST: record.request},
        ).response()


def malformed(errors: Sequence[Any]) -> ApiError:
    """A body whose values pydantic refuses, by the first of its errors."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"])
    return ApiError(
        HttpStatus.MALFORMED,
        f"{at(place or 'the body', first)}"[:500],
        expected="a body as /docs describes it",
        got=ascii(first["input"])[:200],
        hint="every wrong value is an error, unknown keys too",
    )
